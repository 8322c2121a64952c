"""Recognizes what this program wrote, so that a data folder with runs in it does not train on their sample images."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from sushi_research.errors import UserError
from sushi_research.user_files import open_regular, parse_json, read_regular

# Images that are written next to other files of the user's choice of folder; each with the file that tells that they are ours.
PAGES = {
    "comparison.json": {"trade_off", "curves", "differences", "matrix", "timestep_bins", "pictures", "samples"},
    "evaluation.json": {"grid", "lora_scales"},
}
GRID = "the images of a grid"
PICTURES = (".png", ".jpg", ".webp")
# Other programs have files of these names too, so one of these keys must be in them.
KEYS = {
    "run.json": ("format", "identity"),
    "files.json": ("version", "files"),
    "comparison.json": ("variants", "families"),
    "evaluation.json": ("validation_set", "results"),
    "plan.json": ("global_batch_size",),
    "data_report.json": ("counts",),
}
# scripts/sample.py writes each image of grid.png as grid/ROW-COLUMN.png, from 00-00.png on.
_CELL = re.compile(r"\d{2,}-\d{2,}\.png")
_SHARD = re.compile(r"shard-[0-9a-f]{32,}\.arrow")
# What `remembered.py` writes. The names of other programs' tables may end so too.
_REMEMBERED = re.compile(r"[a-z-]+-[0-9a-f]{32}\.arrow")
_WANDB_RUN = re.compile(r"(offline-)?run-\d{8}_\d{6}-.+")


def kind_of(folder: Path, names: Collection[str]) -> str | None:
    """What a folder with these entries is, if this program wrote it; else None."""
    names = set(names)
    if names & {".lock", "config.yaml", "plan.json", "provenance.json"} and _is_ours(folder, "run.json", names):
        return "a run folder"
    if ".lock" in names and _starts_with(folder / ".lock", b"process "):
        return "a run folder"
    if folder.name == "dry_run" and any(_is_ours(folder, name, names) for name in ("plan.json", "data_report.json")):
        return "the folder of a dry run"
    if {"provenance.json", "evaluation.parquet"} <= names:
        return "the evaluation of an adapter file"
    stores = any(name == "latents" or name.startswith(("text_", "generated_")) for name in names)
    files = _REMEMBERED if folder.name == "remembered" else _SHARD
    if (stores and _is_ours(folder, "files.json", names)) or any(map(files.fullmatch, names)):
        return "a cache folder"
    if folder.name == "wandb" and any(_WANDB_RUN.fullmatch(name) for name in names):
        return "a folder of W&B"
    visible = {name for name in names if not name.startswith(".")}
    if "00-00.png" in visible and all(_CELL.fullmatch(name) for name in visible):
        if any(folder.with_name(folder.name + suffix).is_file() for suffix in PICTURES):
            return GRID
    return None


def own_pictures(folder: Path, folders: Collection[str], files: Collection[str]) -> set[str]:
    """Those files of a folder that are plots and grids of this program."""
    ours = {f"{stem}.png" for page, stems in PAGES.items() if _is_ours(folder, page, files) for stem in stems}
    here = set(files)
    for name in folders:
        grids = {f"{name}{suffix}" for suffix in PICTURES} & here
        if grids and kind_of(folder / name, _entries(folder / name)) == GRID:
            ours |= grids
    return ours & here


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


def _is_ours(folder: Path, name: str, names: Collection[str]) -> bool:
    """Whether a file of one of the names in KEYS is there and has what this program writes into it."""
    if name not in names:
        return False
    try:
        content = parse_json(read_regular(folder / name), name)
    except UserError:
        return False
    return isinstance(content, dict) and any(key in content for key in KEYS[name])


def _starts_with(path: Path, text: bytes) -> bool:
    try:
        with open_regular(path) as file:
            return file.read(len(text)) == text
    except (OSError, UserError):
        return False
