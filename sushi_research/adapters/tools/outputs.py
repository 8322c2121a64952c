"""The names of files that a tool writes: checked before any work, so that nothing is overwritten."""

from __future__ import annotations

from pathlib import Path

from sushi_research.adapters.tools.base_weights import BaseWeights
from sushi_research.errors import UserError
from sushi_research.user_files import expand_path


def new_file(name: str, suffix: str, key: str) -> Path:
    """A file that can be written: UserError, before any work, if there is one already, or no folder for it."""
    path = Path(expand_path(name, key=key))
    if suffix and path.suffix != suffix:
        raise UserError(f"{key}: {path} does not end in {suffix}: give such a name.")
    if path.exists() or path.is_symlink():
        raise UserError(f"{key}: {path} exists already: give another name, or remove it.")
    if not path.parent.is_dir():
        raise UserError(f"{key}: {path.parent} is not a folder: make it, or give another place.")
    return path


def require_kind(base: BaseWeights, output: Path) -> None:
    """UserError unless the name fits what is written: a file for a base in one, else a folder."""
    is_file = output.suffix == ".safetensors"
    if is_file == base.path.is_dir():
        what = (
            "in diffusers format, so a folder is written" if is_file else "one file, so a .safetensors file is written"
        )
        raise UserError(f"--output: {base.source} is {what}: give such a name, not {output}.")
    if not is_file and output.resolve().is_relative_to(base.path.resolve()):
        raise UserError(f"--output: {output} is within the base {base.source}, which is copied: give another place.")
