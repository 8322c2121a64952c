"""What the demo adds to the page of its run, from a run folder made up here: no training and no drawing by a base."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

from demo.checker import Reading, score
from demo.concepts import CONCEPTS, known_scenes
from demo.drawing import draw
from demo.measure import Loss, Measured
from demo.report import additions
from demo.show import summary
from sushi_research.reports import run_page
from sushi_research.runs.run_folder import RunFolder

ROOT = Path(__file__).parents[2]


def test_the_page_of_the_demo_has_its_scores_on_top(tmp_path: Path) -> None:
    concept, run = CONCEPTS["star"], tmp_path
    asked, known = concept.unseen_scenes(4), known_scenes(4)
    readings = [Reading(scene, scene, 0.0, 0.0, 1.0) for scene in asked]
    readings[1] = Reading(None, asked[1], 1.0, 1.0, 1.0)
    readings[2] = Reading(asked[0], asked[0], 0.0, 0.0, 1.0)
    kept = score([Reading(scene, scene, 0.0, 0.0, 1.0) for scene in known], known)
    measured = Measured(
        Loss((0.3, 0.5)), score(readings, asked), kept, asked, [draw(scene) for scene in asked], readings
    )
    (run / "stage_timings.json").write_text('{"caching": 1.0, "training": 3.0}')
    prompt = asked[0].caption
    config = {
        "model": {"base": "demo/base/sdxl"},
        "data": {"path": str(ROOT / "demo/photos/star")},
        "train": {"steps": 360},
        "sample": {"prompts": [prompt]},
    }
    (run / "plan.json").write_text(json.dumps({"global_batch_size": 8, "steps": 360}))
    folder = run / "samples/step-00000360"
    folder.mkdir(parents=True)
    draw(asked[0]).save(folder / f"{prompt}.png")  # without the PNG text, the file's name is the label
    added = additions(concept, config, measured, measured, summary(run, concept, measured, measured))
    run_page.write(RunFolder(run, None), "finished at step 360", added)
    page = (run / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S)))
    places = [
        text.index(words)
        for words in (
            "A LoRA learns",
            "360 steps on 16 photos of it and 32 prior images",
            "50% → 50%",
            "100% → 100%",
            "0.400 → 0.400",
            "step 360 a real picture",
            "2 of 4 right, the others framed in red.",
            f"{asked[1].caption} (read as none of these)",
            f"{asked[2].caption} (read as {asked[0].caption})",
            "4 s in all: caching 1.0 s training 3.0 s",
        )
    ]
    assert places == sorted(places)
    assert page.count("<figure") == 2 + 4 and page.count('<figure class="marked"') == 2
