"""The tables that the commands of this folder write into pages of docs/, between two marks, and the note below a table."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from sushi_research.errors import UserError
from sushi_research.files import write_atomic
from sushi_research.runs import code

ROOT = Path(__file__).resolve().parents[1]


def around_table(path: Path, name: str) -> tuple[str, str]:
    """The parts of the page before and after the table `name`, marks included. UserError if the two marks are missing."""
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    page = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise UserError(f"{path} has no marks {begin} and {end} for the table: add them.")
    return before + begin, end + after


def write_table(path: Path, name: str, text: str) -> None:
    """Replaces the table `name` in the page `path` by `text`."""
    before, after = around_table(path, name)
    write_atomic(path, f"{before}\n{text}\n{after}".encode())


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table. The first column is text, the others are numbers, aligned to the right."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    return lines + [f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows]


def circumstances(libraries: Sequence[str] = ("torch", "diffusers", "peft"), scripts: Iterable[str] = ()) -> str:
    """One sentence: the cores, the versions, the hash of each script's code, and the date."""
    parts = [f"{os.cpu_count()} CPU cores", *(f"{name} {version(name)}" for name in libraries)]
    parts += [f"code of {Path(script).name} {code.code_of(ROOT / script)['hash'][:8]}" for script in scripts]
    return f"{', '.join(parts)}, {time.strftime('%Y-%m-%d', time.gmtime())}."
