"""The content of the demo's report, from a run folder made up here: no training and no drawing by a base."""

from __future__ import annotations

import html
import re
from pathlib import Path

from PIL import Image

from demo.checker import Reading, score
from demo.concepts import CONCEPTS, known_scenes
from demo.drawing import draw
from demo.measure import Loss, Measured
from demo.report import write_report
from demo.show import summary

ROOT = Path(__file__).parents[2]


def test_the_report_shows_photos_pictures_scores_and_times(tmp_path: Path) -> None:
    concept, run = CONCEPTS["star"], tmp_path
    asked, known = concept.unseen_scenes(4), known_scenes(4)
    readings = [Reading(scene, scene, 0.0, 0.0, 1.0) for scene in asked]
    readings[1] = Reading(None, asked[1], 1.0, 1.0, 1.0)
    readings[2] = Reading(asked[0], asked[0], 0.0, 0.0, 1.0)
    kept = score([Reading(scene, scene, 0.0, 0.0, 1.0) for scene in known], known)
    measured = Measured(
        Loss((0.3, 0.5)), score(readings, asked), kept, asked, [draw(scene) for scene in asked], readings
    )
    for name in ("demo.png", "loss.png"):
        Image.new("RGB", (8, 8)).save(run / name)
    (run / f"{run.name}.safetensors").write_bytes(bytes(2048))
    (run / "stage_timings.json").write_text('{"caching": 1.0, "training": 3.0}')
    config = {
        "model": {"base": "demo/base/sdxl"},
        "data": {"path": str(ROOT / "demo/photos/star")},
        "train": {"steps": 360},
    }
    write_report(run, concept, config, measured, measured, summary(run, concept, measured, measured))
    page = (run / "demo.html").read_text(encoding="utf-8")
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    for words in (
        "360 steps on 16 photos of it and 32 prior images",
        "50% → 50%",
        "100% → 100%",
        "0.400 → 0.400",
        "2.0 KB",
        "2 of 4 right, the others framed in red.",
        f"{asked[1].caption} (read as none of these)",
        f"{asked[2].caption} (read as {asked[0].caption})",
        "4 s in all: caching 1.0 s training 3.0 s",
        "base: demo/base/sdxl",
    ):
        assert words in re.sub(r"\s+", " ", text), words
    assert page.count("<figure") == concept.trained + concept.prior + 4
    assert page.count('<figure class="marked"') == 2
