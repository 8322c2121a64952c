"""The page of a run is one well-formed file that shows what is in it as text, whatever stands in captions, names and configs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_runs import fake_run
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sushi_research.data.buckets import BucketRule
from sushi_research.data.items import make_items
from sushi_research.data.samples import Sample
from sushi_research.fingerprints import content_hash
from sushi_research.reports import run_page, thumbnails
from sushi_research.runs.run_folder import RunFolder

RULE = BucketRule(resolution=64, step=32, min_side=32, max_side=128)
HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</figcaption></title></style></pre><h1>gone</h1>",
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; &#x3c;",
    "javascript:alert(1)",
    "Training images",
    "a" * 500,
    "寿司\N{RIGHT-TO-LEFT OVERRIDE}gnp.exe",
]
VOID = {"meta", "img"}
SCRIPTLESS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "main",
    "h1",
    "h2",
    "h3",
    "p",
    "nav",
    "a",
    "div",
    "span",
    "b",
    "i",
}
SCRIPTLESS |= {
    "ul",
    "li",
    "table",
    "tr",
    "th",
    "td",
    "dl",
    "dt",
    "dd",
    "figure",
    "figcaption",
    "img",
    "details",
    "summary",
    "pre",
}


@dataclass
class Read(HTMLParser):
    """A page as a browser reads it: its open tags, the text by tag, and all attributes."""

    open: list[str] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)
    texts: dict[str, list[str]] = field(default_factory=dict)
    attributes: list[tuple[str, str, str | None]] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]][-1] += data

    def values(self, name: str) -> list[str | None]:
        return [value for _, attribute, value in self.attributes if attribute == name]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run whose captions, file names, prompts, notes and config are hostile."""
    run = RunFolder(fake_run(tmp_path / "a run", pictures=False), None)
    image = Image.new("RGB", (8, 6), "red")
    for step in (0, 20):
        folder = run.samples / f"step-{step:08d}"
        folder.mkdir(parents=True)
        for number, text in enumerate(HOSTILE):
            info = PngInfo()
            info.add_text("prompt", text)
            image.save(folder / f"{number:02d}-seed0.png", pnginfo=info)
    photo = tmp_path / "photo.jpg"
    image.resize((900, 700)).save(photo, quality=90)
    samples = [
        Sample(f"{number}{text}", f"{number:032}", text, 64, 64, 1, photo.read_bytes)
        for number, text in enumerate(HOSTILE)
    ]
    thumbnails.write(run, make_items(samples, RULE)[0])
    problems = [{"name": text, "reason": text} for text in HOSTILE]
    run.data_report.write_text(
        json.dumps({"used": [], "problems": problems, "notes": HOSTILE, "prior_path": {"problems": problems}})
    )
    settings = {"lora": {"rank": 8}, "train": {"seed": 0}, "sample": {"prompts": HOSTILE}}
    run.config.write_text(json.dumps(settings))
    words = [
        "images       7",
        "skipped      1:",
        "             x",
        *(f"{'samples' * (not n):<13}{text}" for n, text in enumerate(HOSTILE)),
    ]
    plan = {"global_batch_size": 4, "steps": 40, "images": 7, "text": words}
    run.plan.write_text(json.dumps(plan))
    return run


def read(run: RunFolder) -> Read:
    page = Read()
    page.feed(run.report.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


def test_hostile_texts_are_text(run, monkeypatch):
    page = (run_page.write(run, "at step 20 of 40"), read(run))[1]
    assert page.tags <= SCRIPTLESS
    assert {name for _, name, _ in page.attributes if name.startswith("on")} == set()
    assert {value[:10] for value in page.values("src")} == {"data:image"}
    assert all(value.startswith("#part-") for value in page.values("href"))
    # Each is whole, in the place of its kind; what turns the direction of the text is written as an escape.
    shown = [text.replace("\N{RIGHT-TO-LEFT OVERRIDE}", "\\u202e") for text in HOSTILE]
    assert set(shown) <= set(page.texts["h3"]), "prompts"
    assert set(shown) <= set(page.texts["figcaption"]), "captions"
    assert {f"{text}: {text}" for text in shown} <= set(page.texts["li"]), "files that are skipped"
    plan = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert plan["images"] == "7" and plan["samples"].split("\n") == shown and "skipped" not in plan
    assert page.texts["pre"][-1] == run.config.read_text()


def test_the_page_of_a_run_that_goes_on(run):
    """Every part has its heading; it says how far the run is, and stands alone."""
    for step in range(1, 15):
        run.step_adapter(step).write_bytes(bytes(2048))
    run_page.write(run, "at step 20 of 40")
    page = read(run)
    assert [text for text in page.texts["td"] if text.endswith(".safetensors")] == [
        f"a run-{step:06d}.safetensors" for step in range(14, 2, -1)
    ]
    assert "a run-000002.safetensors\na run-000001.safetensors" in page.texts["pre"] and "step 14" in page.texts["b"]
    assert page.texts["h2"] == [
        "Samples", "Which checkpoint to take", "Outcomes by step", "Adapter files", "Curves", "Training images", "Plan",
        "Problems of the data", "Provenance", "Config",
    ]  # fmt: skip
    assert len(set(page.values("id"))) == len(page.texts["h2"]) == len(page.values("href"))
    assert page.texts["p"][0].startswith("At step 20 of 40. Written 20")
    assert "width:50.0%" in page.values("style") and "20 of 40" in page.texts["b"]
    assert ("meta", "name", "viewport") in page.attributes
    assert (
        page.texts["figcaption"].count("before training") == page.texts["figcaption"].count("step 20") == len(HOSTILE)
    )
    with Image.open(run.curves) as curves:
        assert curves.width == 1100, "loss.png grows during the run"


def test_trackers_get_the_page_without_the_training_images(run):
    page = Read()
    page.feed(run_page.write(run, "finished at step 40").html(training_images=False))
    assert "Training images" not in page.texts["h2"] and "Plan" in page.texts["h2"]
    assert set(page.texts["figcaption"]) == {"before training", "step 20"}


def test_many_training_images_are_sixty(run, tmp_path, monkeypatch):
    """They are spread over all folders, are made once, and are small; other data replace them."""
    reads = []

    def items(names):
        load = lambda: (reads.append(1), (tmp_path / "photo.jpg").read_bytes())[1]  # noqa: E731
        samples = [Sample(name, content_hash(name.encode()), name, 64, 64, 2, load) for name in names]
        return make_items(samples, RULE)[0]

    names = [f"{folder}/{number:03d}.jpg" for folder in ("a", "b") for number in range(100)]
    for _ in range(2):
        thumbnails.write(run, items(names))
    assert len(reads) == 60
    shown, count = thumbnails.pictures(run)
    assert count == 200 and shown[0].caption == "a/000.jpg (x 2)" and shown[-1].caption == "b/099.jpg (x 2)"
    assert {picture.source[:2] for picture in shown} == {b"\xff\xd8"} and max(len(each.source) for each in shown) < 3000
    thumbnails.write(run, items(names[:3]))
    assert len(thumbnails.pictures(run)[0]) == 3
    run_page.write(run, "at step 20 of 40")
    assert "3 images, each with its caption. Tap a long caption to read all of it." in read(run).texts["p"]


def test_what_is_damaged_is_a_sentence_about_that_file(run):
    """The rest of the page is there, and nothing on it is made up: with damaged metrics it is not known how far the run is."""
    run.metrics.write_text("{}\n")
    run.evaluation.write_bytes(b"not a table")
    run.data_report.write_text(json.dumps({"used": [], "problems": [], "cropped": [{"name": "a.jpg", "lost": "much"}]}))
    run.step_adapter(10).symlink_to("nowhere")
    run_page.write(run, "finished at step 20")
    page = read(run)
    problems = [text for text in page.texts["li"] if str(run.path) in text]
    assert [text.split()[1].partition(":")[0] for text in problems] == [
        "run/evaluation.parquet",
        "run/metrics.jsonl,",
        "run/data_report.json",
    ]
    assert not any("a part of the page is missing" in text for text in page.texts["li"])
    assert not any("of 40" in text for text in page.texts["b"]) and "width:0.0%" not in page.values("style")
    assert (
        "Which checkpoint to take" in page.texts["h2"]
        and "There are no evaluations that can be read." in page.texts["p"]
    )
