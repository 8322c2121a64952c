"""What a start costs for each image: nothing in Python if the images are known, else twice as much for twice as many."""

import contextlib
import sys
from collections import Counter

import pytest
from script_runs import load_script

from benchmarking import start
from benchmarking.synthetic_rows import save_rows
from sushi_research import fingerprints
from sushi_research.data import findings

SIZES = (100, 200)
ADDED = SIZES[1] - SIZES[0]


class Calls(start.Meter):
    """Counts the calls of Python and C functions in each part, by the function's name."""

    def __init__(self):
        self.parts: dict[str, Counter] = {}

    @contextlib.contextmanager
    def part(self, name):
        found = self.parts.setdefault(name, Counter())

        def note(frame, event, argument):
            if event == "call":
                found[frame.f_code.co_name] += 1
            elif event == "c_call":
                found[argument.__name__] += 1

        before = sys.getprofile()
        sys.setprofile(note)
        try:
            yield {}
        finally:
            sys.setprofile(before)


@pytest.fixture(scope="module")
def counts(bases, tmp_path_factory):
    """(number of images, whether it is the second start) -> the calls of each part."""
    folder, found = tmp_path_factory.mktemp("scale"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(findings, "LISTED", ADDED // 10)  # images that data_report.json names
        patch.setattr(fingerprints, "RACY_NS", 0)  # what was just written counts as known
        _count(bases["sdxl"], folder, found)
    return found


def _count(base, folder, found):
    for size in SIZES:
        data = save_rows(folder / str(size), size)
        config = start.config_of(data, folder / f"work-{size}", 4 / size, base)
        for is_second in (False, True):
            calls = Calls()
            loader, finish = start.start(load_script("sdxl"), config, calls, fill=not is_second)
            with finish, calls.part("order"):
                loader.sampler.step(0)
            found[size, is_second] = calls.parts


def test_a_first_start_is_linear(counts):
    few, many = (counts[size, False] for size in SIZES)
    assert many["data"].total() - few["data"].total() > ADDED, "each image is decoded"
    ratios = {part: many[part].total() / few[part].total() for part in few}
    assert max(ratios.values()) < 2.2, ratios


def test_a_second_start_calls_nothing_for_each_image(counts):
    few, many = (counts[size, True] for size in SIZES)
    more = {part: many[part] - few[part] for part in few}
    # Half a call for each of the added images, of all functions together.
    assert {part: each.most_common(5) for part, each in more.items() if each.total() > ADDED / 2} == {}
