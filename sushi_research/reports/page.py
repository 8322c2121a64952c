"""A page made of blocks, written as Markdown or as one HTML file that needs no other."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

STYLE = """
body { margin: 0; background: #fbf8f2; color: #1e2b28; font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 36px 20px 64px; }
h1 { font-size: 28px; margin: 0 0 10px; } h2 { font-size: 19px; margin: 36px 0 10px; }
img { max-width: 100%; border: 1px solid #e4dccf; border-radius: 8px; background: #fff; display: block; margin: 12px 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; background: #fff; font-size: 14px; min-width: 60%; }
th, td { text-align: right; padding: 6px 11px; border: 1px solid #e4dccf; font-variant-numeric: tabular-nums; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: #5b6763; font-weight: 500; }
ul.verdict { list-style: none; padding: 0; } ul.verdict li { background: #fff; border: 1px solid #e4dccf; border-left: 6px solid
#999; border-radius: 6px; padding: 9px 14px; margin: 8px 0; } ul.verdict li.better { border-left-color: #009e73; }
ul.verdict li.worse { border-left-color: #d55e00; } p, li { max-width: 95ch; } code { font-size: 14px; }
ul.warning li { color: #8a3c00; }
"""


@dataclass
class Block:
    """A piece of the page: a heading, a paragraph, a list, a table (rows with their head first) or a picture."""

    kind: Literal["title", "heading", "text", "list", "verdict", "warning", "table", "picture"]
    text: str = ""
    items: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    path: Path | None = None


def to_markdown(page: Sequence[Block]) -> str:
    """The page as Markdown; pictures are named as they lie beside it."""
    parts = []
    for block in page:
        if block.kind == "title":
            parts.append(f"# {block.text}")
        elif block.kind == "heading":
            parts.append(f"## {block.text}")
        elif block.kind == "text":
            parts.append(block.text)
        elif block.kind in ("list", "warning"):
            parts.append("\n".join(f"- {item}" for item in block.items))
        elif block.kind == "verdict":
            parts.append("\n".join(f"- {item.partition('|')[2]}" for item in block.items))
        elif block.kind == "picture":
            parts.append(f"![{block.text}]({block.path.name})")
        else:
            head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in block.rows]
            lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def to_html(page: Sequence[Block]) -> str:
    """The page as one HTML file that needs no other."""
    parts = []
    for block in page:
        text = html.escape(block.text)
        if block.kind in ("title", "heading"):
            tag = "h1" if block.kind == "title" else "h2"
            parts.append(f"<{tag}>{text}</{tag}>")
        elif block.kind == "text":
            parts.append(f"<p>{text}</p>")
        elif block.kind in ("list", "warning"):
            items = "".join(f"<li>{html.escape(item)}</li>" for item in block.items)
            parts.append(f"<ul class={block.kind}>{items}</ul>")
        elif block.kind == "verdict":
            told = [item.partition("|") for item in block.items]
            items = "".join(f'<li class="{kind}">{_emphasised(words)}</li>' for kind, _, words in told)
            parts.append(f"<ul class=verdict>{items}</ul>")
        elif block.kind == "picture":
            data = base64.b64encode(block.path.read_bytes()).decode()
            parts.append(f'<img alt="{text}" src="data:image/png;base64,{data}">')
        else:
            head, *rows = [[html.escape(cell) for cell in row] for row in block.rows]
            lines = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows)
            parts.append(f"<div class=scroll><table><tr><th>{'</th><th>'.join(head)}</th></tr>{lines}</table></div>")
    title = html.escape(page[0].text)
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
    return f"{head}<body><main>{''.join(parts)}</main></body></html>\n"


def _emphasised(sentence: str) -> str:
    """A sentence whose statement, up to the first colon, stands out from its evidence."""
    statement, colon, evidence = sentence.partition(": ")
    return f"<b>{html.escape(statement)}</b>{colon}{html.escape(evidence)}"
