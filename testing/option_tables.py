"""Writes the tables of other programs' options into their pages (docs/guides) from sushi_research/config/other_programs.py.

python -m testing.option_tables
"""

from __future__ import annotations

from pathlib import Path

from sushi_research.config.other_programs import PROGRAMS, table

GUIDES = Path(__file__).parents[1] / "docs/guides"
# The tables are the rest of the page after this heading.
HEADING = "## Option names\n"


def page(program: str) -> Path:
    """The page of a program."""
    return GUIDES / f"from_{program.lower()}.md"


def with_table(text: str, program: str) -> str:
    """The text of a page with the tables as they should be."""
    before, heading, _ = text.partition(HEADING)
    assert heading, f"the page has no heading {HEADING!r}"
    return f"{before}{HEADING}\n{table(program)}\n"


if __name__ == "__main__":
    for name in PROGRAMS:
        page(name).write_text(with_table(page(name).read_text(encoding="utf-8"), name), encoding="utf-8")
