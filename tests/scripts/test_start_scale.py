"""What a start costs for each image: nothing in Python if the images are known, else twice as much for twice as many."""

import contextlib
import sys
from collections import Counter

import pytest
from script_runs import load_script

from benchmarking import start
from benchmarking.synthetic_rows import save_files, save_rows

SIZES = (300, 600)
# Functions that a start calls for an image that it does not know: they read, decode and hash.
PER_IMAGE = ("decode_and_describe", "fingerprint", "read_image")


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


@pytest.fixture(scope="module", params=[save_rows, save_files], ids=["rows", "files"])
def counts(request, bases, tmp_path_factory):
    """(number of images, whether it is the second start) -> the calls of each part."""
    folder, found = tmp_path_factory.mktemp("scale"), {}
    for size in SIZES:
        data = request.param(folder / str(size), size)
        config = start.config_of(data, folder / f"work-{size}", 4 / size, bases["sdxl"])
        for is_second in (False, True):
            calls = Calls()
            loader, finish = start.start(load_script("sdxl"), config, calls, fill=not is_second)
            with finish, calls.part("order"):
                loader.sampler.step(0)
            found[size, is_second] = calls.parts
    return found


def test_a_first_start_is_linear(counts):
    few, many = (counts[size, False] for size in SIZES)
    assert sum(many["data"][name] for name in PER_IMAGE) >= SIZES[1], "the names of the functions have changed"
    ratios = {part: many[part].total() / few[part].total() for part in few}
    assert max(ratios.values()) < 2.2, ratios


def test_a_second_start_calls_nothing_for_each_image(counts):
    few, many = (counts[size, True] for size in SIZES)
    assert {part: many[part][name] for part in many for name in PER_IMAGE if many[part][name]} == {}
    more = {part: (many[part] - few[part]) for part in few}
    # Half a call for each of the added images, of all functions together.
    assert {part: each.most_common(5) for part, each in more.items() if each.total() > (SIZES[1] - SIZES[0]) / 2} == {}
