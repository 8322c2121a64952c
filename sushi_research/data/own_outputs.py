"""Recognizes what this program wrote, so that a data folder with runs in it does not train on their sample images."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from sushi_research.errors import UserError

# Images that are written next to other files of the user's choice of folder; each with the file that tells that they are ours.
PAGES = {
    "comparison.json": {"curves", "differences", "matrix", "timestep_bins", "samples"},
    "evaluation.json": {"grid", "lora_scales"},
}
GRID = "the images of a grid"
PICTURES = (".png", ".jpg", ".webp")
# scripts/sample.py writes each image of grid.png as grid/ROW-COLUMN.png.
_CELL = re.compile(r"\d{2,}-\d{2,}\.png")


def kind_of(folder: Path, names: Collection[str]) -> str | None:
    """What a folder with these entries is, if this program wrote it; else None."""
    names = set(names)
    if "run.json" in names and names & {".lock", "config.yaml", "plan.json", "provenance.json"}:
        return "a run folder"
    if ".lock" in names and _starts_with(folder / ".lock", b"process "):
        return "a run folder"
    if {"provenance.json", "evaluation.parquet"} <= names:
        return "the evaluation of an adapter file"
    stores = any(name == "latents" or name.startswith(("text_", "generated_")) for name in names)
    if ("files.json" in names and stores) or any(re.fullmatch(r"shard-[0-9a-f]{32,}\.arrow", name) for name in names):
        return "a cache folder"
    if folder.name == "wandb" and any(name.startswith(("run-", "offline-run-")) for name in names):
        return "a folder of W&B"
    visible = {name for name in names if not name.startswith(".")}
    if visible and all(_CELL.fullmatch(name) for name in visible):
        if any(folder.with_name(folder.name + suffix).is_file() for suffix in PICTURES):
            return GRID
    return None


def own_pictures(folder: Path, folders: Collection[str], files: Collection[str]) -> set[str]:
    """Those files of a folder that are plots and grids of this program."""
    ours = {f"{stem}.png" for page, stems in PAGES.items() if page in files for stem in stems}
    for name in folders:
        grids = {f"{name}{suffix}" for suffix in PICTURES} & set(files)
        if grids and kind_of(folder / name, _entries(folder / name)) == GRID:
            ours |= grids
    return ours & set(files)


def require_apart(key: str, folder: Path, skipped: Collection[str], outputs: Mapping[Path, str]) -> None:
    """Raises UserError if a folder of tables holds what this program wrote: `datasets` would take its files for tables too."""
    inside = [str(path) for path in outputs if path.resolve().is_relative_to(folder.resolve())]
    if inside or skipped:
        found = inside[0] if inside else next(iter(skipped))
        raise UserError(
            f"{key}: {folder} holds tables, and inside it is {found}, whose files would be taken for tables too: "
            f"give run.folder and cache.folder other places, or {key} the folder of the tables alone."
        )


def _entries(folder: Path) -> list[str]:
    """The names in a folder; none if it cannot be read, which the walk reports."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _starts_with(path: Path, text: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(text)) == text
    except OSError:
        return False
