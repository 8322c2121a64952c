"""What the demo adds to `report.html`, the page of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from demo.concepts import Concept
from demo.drawing import Scene, draw
from demo.measure import Measured
from sushi_research.reports.page import TYPES, Block, Card, Picture
from sushi_research.reports.run_page import Additions


def additions(
    concept: Concept, config: dict[str, Any], before: Measured, after: Measured, facts: dict[str, Any]
) -> Additions:
    """What the demo adds to the page of its run: the scores on top, a real picture for each prompt, and all scored pictures."""
    photos = [path for path in Path(config["data"]["path"]).rglob("*") if path.suffix in TYPES]
    scenes = {prompt: Scene.from_caption(prompt) for prompt in config["sample"]["prompts"]}
    return Additions(
        title=f"A LoRA learns {concept.title}",
        lead=_lead(concept, config, len(photos)),
        cards=_cards(before, after, facts),
        references={prompt: draw(scene) for prompt, scene in scenes.items() if scene},
        blocks=[
            Block("heading", "Prompts that no photo shows"),
            *_drawn(after),
            Block("heading", "Scores by word"),
            Block("table", rows=_words(facts)),
        ],
    )


def _lead(concept: Concept, config: dict[str, Any], pictures: int) -> str:
    prior = pictures - concept.trained
    return (
        f"The base {config['model']['base']} had never seen {concept.title}. The adapter was trained for "
        f"{config['train']['steps']} steps on {concept.trained} photos of it and {prior} prior images of what the base knows. It "
        "is scored on prompts with combinations that no photo shows, and on prompts that the base knew before. Every score is "
        "read from the pixels by code that knows how the scenes are drawn; a blurred or half-right picture counts as wrong."
    )


def _cards(before: Measured, after: Measured, facts: dict[str, Any]) -> list[Card]:
    concept = f"{before.concept.share:.0%} → {after.concept.share:.0%}"
    known = f"{before.known.share:.0%} → {after.known.share:.0%}"
    loss = f"{facts['loss']['before']:.3f} → {facts['loss']['after']:.3f}"
    return [
        Card("the concept, drawn right", concept, f"of {after.concept.total} unseen prompts"),
        Card("the rest, drawn right", known, f"of {after.known.total} prompts it knew"),
        Card("loss on unseen pictures", loss, "the same noise before and after"),
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
