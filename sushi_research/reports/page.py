"""A report page as a list of blocks, written as Markdown or as one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Literal

from PIL import Image

STYLE = """
:root { --ink: #1e2b28; --soft: #5b6763; --line: #e4dccf; --paper: #fbf8f2; --card: #fff; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 36px 20px 64px; }
h1 { font-size: 28px; margin: 0 0 10px; } h2 { font-size: 19px; margin: 36px 0 10px; }
p, li { max-width: 95ch; } p.lead { color: var(--soft); margin: 0 0 24px; } code { font-size: 14px; }
img.wide { max-width: 100%; border: 1px solid var(--line); border-radius: 8px; background: #fff; display: block; margin: 12px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; background: var(--card); font-size: 14px; min-width: 60%; }
th, td { text-align: right; padding: 6px 11px; border: 1px solid var(--line); font-variant-numeric: tabular-nums;
white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 500; }
ul.result { list-style: none; padding: 0; }
ul.result li { background: var(--card); border: 1px solid var(--line); border-left: 6px solid #999; border-radius: 6px;
padding: 9px 14px; margin: 8px 0; }
ul.result li.better { border-left-color: #009e73; } ul.result li.worse { border-left-color: #d55e00; }
ul.warning li { color: #8a3c00; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 14px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; }
.card b { display: block; font-size: 28px; line-height: 1.25; } .card span { color: var(--soft); font-size: 14px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(118px, 1fr)); gap: 12px; }
figure { margin: 0; font-size: 12px; line-height: 1.35; color: var(--soft); } figure img { width: 100%; border-radius: 6px; }
figure.marked img { outline: 3px solid #d9534f; }
.bar { display: flex; height: 26px; border-radius: 6px; overflow: hidden; } .bar i { display: block; }
.legend { color: var(--soft); font-size: 14px; margin-top: 8px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin: 0 5px 0 14px; }
summary { cursor: pointer; color: var(--soft); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px; overflow: auto; font-size: 13px; }
"""
COLOURS = ("#36a3c9", "#2b8a5c", "#f0b23a", "#e4573d", "#8648b0", "#98a4a0", "#4a5a90")
TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}

Kind = Literal[
    "title", "heading", "lead", "text", "list", "result", "warning", "table", "picture", "pictures", "cards", "times", "details"
]  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A small image (a file or in memory) with its caption; `marked` draws a red frame."""

    source: Path | Image.Image
    caption: str
    marked: bool = False


@dataclass(frozen=True)
class Card:
    """A number in large print, with its name above and a detail below."""

    name: str
    value: str
    detail: str


@dataclass
class Block:
    """A block of the page. Each kind uses these fields:

    - title, heading, lead (a paragraph below the title), text: `text`.
    - list, warning: `items`. result: `items`, each "better|statement: evidence", or with "worse" or "none" instead of "better".
    - table: `rows`, the header first.
    - picture: the image `path`, a file or in memory, at full width, with alternative text `text`.
    - pictures: `pictures` in a grid, with captions. cards: `cards`.
    - times: `seconds` by name, as one bar with a legend.
    - details: the preformatted `items`, folded under the summary `text`.
    """

    kind: Kind
    text: str = ""
    items: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    path: Path | Image.Image | None = None
    pictures: list[Picture] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def to_markdown(page: Sequence[Block]) -> str:
    """The page as Markdown. Image files are linked by name and must be in the page's folder; images in memory are embedded."""
    return "\n\n".join(map(_markdown, page)) + "\n"


def to_html(page: Sequence[Block], title: str | None = None) -> str:
    """The page as one HTML file with embedded images. `title` is for the browser's tab; default: the first block's text."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title or page[0].text)}</title><style>{STYLE}</style>"
    )
    body = "".join(map(_html, page))
    return f'<!doctype html><html lang="en"><head>{head}</head><body><main>{body}</main></body></html>\n'


def _markdown(block: Block) -> str:
    match block.kind:
        case "title":
            return f"# {block.text}"
        case "heading":
            return f"## {block.text}"
        case "text" | "lead":
            return block.text
        case "list" | "warning":
            return _lines(block.items)
        case "result":
            return _lines(item.partition("|")[2] for item in block.items)
        case "table":
            head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in block.rows]
            lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)
        case "picture":
            return f"![{block.text}]({_link(block.path)})"
        case "pictures":
            return "\n\n".join(f"![{picture.caption}]({_link(picture.source)})" for picture in block.pictures)
        case "cards":
            return _lines(f"{card.name}: **{card.value}** ({card.detail})" for card in block.cards)
        case "times":
            return f"{_total(block.seconds)} " + ", ".join(
                f"{name} {value:.1f} s" for name, value in block.seconds.items()
            )
        case "details":
            text = "\n".join(block.items)
            return f"<details><summary>{html.escape(block.text)}</summary>\n\n```\n{text}\n```\n\n</details>"


def _html(block: Block) -> str:
    text = html.escape(block.text)
    match block.kind:
        case "title":
            return f"<h1>{text}</h1>"
        case "heading":
            return f"<h2>{text}</h2>"
        case "text":
            return f"<p>{text}</p>"
        case "lead":
            return f'<p class="lead">{text}</p>'
        case "list" | "warning":
            items = "".join(f"<li>{html.escape(item)}</li>" for item in block.items)
            return f'<ul class="{block.kind}">{items}</ul>'
        case "result":
            results = [item.partition("|") for item in block.items]
            items = "".join(f'<li class="{kind}">{_emphasised(words)}</li>' for kind, _, words in results)
            return f'<ul class="result">{items}</ul>'
        case "table":
            head, *rows = [[html.escape(cell) for cell in row] for row in block.rows]
            lines = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows)
            return f'<div class="scroll"><table><tr><th>{"</th><th>".join(head)}</th></tr>{lines}</table></div>'
        case "picture":
            return f'<img class="wide" alt="{text}" src="{_embedded(block.path)}">'
        case "pictures":
            return f'<div class="pictures">{"".join(map(_figure, block.pictures))}</div>'
        case "cards":
            return f'<div class="cards">{"".join(map(_card, block.cards))}</div>'
        case "times":
            return _bar(block.seconds)
        case "details":
            return f"<details><summary>{text}</summary><pre>{html.escape(chr(10).join(block.items))}</pre></details>"


def _lines(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _emphasised(sentence: str) -> str:
    """HTML of a sentence with its statement (the part before the first colon) in bold."""
    statement, colon, evidence = sentence.partition(": ")
    return f"<b>{html.escape(statement)}</b>{colon}{html.escape(evidence)}"


def _figure(picture: Picture) -> str:
    mark = ' class="marked"' if picture.marked else ""
    return f'<figure{mark}><img alt="" src="{_embedded(picture.source)}">{html.escape(picture.caption)}</figure>'


def _card(card: Card) -> str:
    name, value, detail = map(html.escape, (card.name, card.value, card.detail))
    return f'<div class="card"><span>{name}</span><b>{value}</b><span>{detail}</span></div>'


def _bar(seconds: dict[str, float]) -> str:
    total = sum(seconds.values()) or 1.0
    parts, legend = "", ""
    for (name, value), colour in zip(seconds.items(), cycle(COLOURS), strict=False):
        parts += f'<i style="width:{100 * value / total:.2f}%;background:{colour}"></i>'
        legend += f'<i style="background:{colour}"></i>{html.escape(name)} {value:.1f} s'
    return f'<div class="bar">{parts}</div><div class="legend">{_total(seconds)}{legend}</div>'


def _total(seconds: dict[str, float]) -> str:
    return f"{sum(seconds.values()):.0f} s in all:"


def _link(source: Path | Image.Image) -> str:
    return source.name if isinstance(source, Path) else _embedded(source)


def _embedded(source: Path | Image.Image) -> str:
    """A data URI with a file's bytes, or with an image in memory as PNG."""
    if isinstance(source, Path):
        kind, data = TYPES[source.suffix.lower()], source.read_bytes()
    else:
        stream = io.BytesIO()
        source.save(stream, "PNG", optimize=True)
        kind, data = "image/png", stream.getvalue()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
