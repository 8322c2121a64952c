"""The content of `demo.html`, a self-contained page about a demo run; `reports.page` renders it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from demo.concepts import Concept
from demo.measure import Measured
from sushi_research.files import write_atomic
from sushi_research.reports.page import TYPES, Block, Card, Picture, to_html


def write_report(
    run: Path, concept: Concept, config: dict[str, Any], before: Measured, after: Measured, facts: dict[str, Any]
) -> None:
    """Writes `demo.html` into the run folder; the page needs no other file."""
    photos = sorted(path for path in Path(config["data"]["path"]).rglob("*") if path.suffix in TYPES)
    page = [
        Block("title", f"A LoRA learns {concept.title}"),
        Block("lead", _lead(concept, config, len(photos))),
        Block("cards", cards=_cards(run.name, config, before, after, facts)),
        Block("heading", "Before, on the way, after"),
        Block(
            "picture", "Prompts as rows; the base, two steps on the way, the end, a real picture", path=run / "demo.png"
        ),
        Block("heading", "What it was shown"),
        Block("pictures", pictures=[Picture(path, path.with_suffix(".txt").read_text().strip()) for path in photos]),
        Block("heading", "Prompts that no photo shows"),
        *_drawn(after),
        Block("heading", "Scores by word"),
        Block("table", rows=_words(facts)),
        Block("heading", "Curves"),
        Block("picture", "Curves of the loss, the learning rate and the gradient norm", path=run / "loss.png"),
        Block("heading", "Time of this start"),
        Block("times", seconds=facts["seconds"]),
        Block("heading", "Files"),
        Block("table", rows=[["file", "size"], *([name, _size(size)] for name, size in facts["files"].items())]),
        Block("details", "The run's config", items=[yaml.safe_dump(config, sort_keys=False)]),
    ]
    write_atomic(run / "demo.html", to_html(page, f"{run.name}: {concept.title}").encode())


def _lead(concept: Concept, config: dict[str, Any], pictures: int) -> str:
    prior = pictures - concept.trained
    return (
        f"The base {config['model']['base']} had never seen {concept.title}. The adapter was trained for "
        f"{config['train']['steps']} steps on {concept.trained} photos of it and {prior} prior images of what the base knows. It "
        "is scored on prompts with combinations that no photo shows, and on prompts that the base knew before. Every score is "
        "read from the pixels by code that knows how the scenes are drawn; a blurred or half-right picture counts as wrong."
    )


def _cards(name: str, config: dict[str, Any], before: Measured, after: Measured, facts: dict[str, Any]) -> list[Card]:
    concept = f"{before.concept.share:.0%} → {after.concept.share:.0%}"
    known = f"{before.known.share:.0%} → {after.known.share:.0%}"
    loss = f"{facts['loss']['before']:.3f} → {facts['loss']['after']:.3f}"
    return [
        Card("the concept, drawn right", concept, f"of {after.concept.total} unseen prompts"),
        Card("the rest, drawn right", known, f"of {after.known.total} prompts it knew"),
        Card("loss on unseen pictures", loss, "the same noise before and after"),
        Card("adapter", _size(facts["files"][f"{name}.safetensors"]), f"{config['train']['steps']} steps"),
    ]


def _drawn(after: Measured) -> list[Block]:
    """The number of prompts drawn right, and all images; wrong ones with the scene that the checker recognised."""
    pictures = []
    for image, reading, scene in zip(after.images, after.readings, after.asked, strict=True):
        wrong = reading.scene != scene
        seen = f" (read as {reading.scene.caption if reading.scene else 'none of these'})" if wrong else ""
        pictures.append(Picture(image, scene.caption + seen, marked=wrong))
    wrong = sum(picture.marked for picture in pictures)
    note = f"{len(pictures) - wrong} of {len(pictures)} right" + (", the others framed in red." if wrong else ".")
    return [Block("lead", note), Block("pictures", pictures=pictures)]


def _words(facts: dict[str, Any]) -> list[list[str]]:
    columns = [*facts["concept_right"], *facts["known_right"]]
    titles = {"all": "all of it", "none": "none of these"}
    return [
        ["", "concept, base", "with the adapter", "the rest, base", "with the adapter"],
        *([titles.get(word, word), *(f"{column[word]:.0%}" for column in columns)] for word in columns[0]),
    ]


def _size(size: int) -> str:
    return f"{size / 1024:,.1f} KB"
