"""A report page as a list of blocks, written as Markdown or as one self-contained HTML file (page.html.jinja).

Every text is escaped where it is written: captions, file names and configs come from files of strangers.
"""

from __future__ import annotations

import base64
import functools
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Literal

import jinja2
import markupsafe
from PIL import Image

from sushi_research.errors import printable_lines

COLOURS = ("#36a3c9", "#2b8a5c", "#f0b23a", "#e4573d", "#8648b0", "#98a4a0", "#4a5a90")
TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}

Kind = Literal[
    "title", "heading", "lead", "text", "contents", "list", "result", "warning", "links", "table", "facts", "picture", "panels",
    "pictures", "series", "cards", "progress", "times", "details",
]  # fmt: skip
# A file, an image in memory, or the bytes of a PNG or JPEG file.
Source = Path | Image.Image | bytes


@dataclass(frozen=True)
class Picture:
    """An image with its caption; `marked` draws a red frame."""

    source: Source
    caption: str
    marked: bool = False


@dataclass(frozen=True)
class Link:
    """A link to another page: its text, and its address, such as a path relative to this page, quoted as a URL."""

    text: str
    address: str


@dataclass(frozen=True)
class Card:
    """A number in large print, with its name above and a detail below."""

    name: str
    value: str
    detail: str


@dataclass
class Block:
    """A block of the page. Each kind uses these fields:

    - title, heading, lead (a paragraph below the title), text: `text`. contents: links to all headings, nothing in Markdown.
    - list, warning: `items`. result: `items`, each "better|statement: evidence", or with "worse" or "none" instead of "better".
    - links: `links`. table: `rows`, the header first. facts: `rows` of a name and a value.
    - picture: the image `path` at full width, with alternative text `text`.
    - panels: `pictures` half as wide as the page, with alternative texts. pictures: `pictures` in a grid, with captions, under the
      small heading `text` if there is one.
    - series: `pictures` next to each other under the small heading `text`. cards: `cards`.
    - progress: `share` in 0..1 as a bar, with alternative text `text`. times: `seconds` by name, as one bar with a legend.
    - details: the preformatted `items`, folded under the summary `text`.
    """

    kind: Kind
    text: str = ""
    items: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    path: Source | None = None
    pictures: list[Picture] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    share: float = 0.0


def to_markdown(page: Sequence[Block]) -> str:
    """The page as Markdown. Image files are linked by name and must be in the page's folder; images in memory are embedded."""
    return "\n\n".join(text for block in page if (text := _markdown(block))) + "\n"


def to_html(page: Sequence[Block], title: str | None = None) -> str:
    """The page as one HTML file with embedded images. `title` is for the browser's tab; default: the first block's text."""
    contents = [(place, block.text) for place, block in enumerate(page, 1) if block.kind == "heading"]
    return _template().render(title=title or page[0].text, blocks=page, contents=contents)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        # What changes the direction of the text, or cannot be shown, is written as an escape. A data URI is markup already.
        finalize=lambda value: printable_lines(str(value)) if not isinstance(value, markupsafe.Markup) else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"embedded": _embedded, "statement": _statement, "shares": _shares, "total": _total}
    return environment.get_template("page.html.jinja")


def _markdown(block: Block) -> str:
    match block.kind:
        case "title":
            return f"# {block.text}"
        case "heading":
            return f"## {block.text}"
        case "text" | "lead" | "progress":
            return block.text
        case "contents":
            return ""
        case "list" | "warning":
            return _lines(block.items)
        case "result":
            return _lines(item.partition("|")[2] for item in block.items)
        case "table":
            head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in block.rows]
            lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)
        case "facts":
            return _lines(f"{name}: {value}" for name, value in block.rows)
        case "links":
            return _lines(f"[{link.text}]({link.address})" for link in block.links)
        case "picture":
            return f"![{block.text}]({_address(block.path)})"
        case "pictures" | "panels" | "series":
            images = [f"![{picture.caption}]({_address(picture.source)})" for picture in block.pictures]
            return "\n\n".join([*([f"### {block.text}"] if block.text else []), *images])
        case "cards":
            return _lines(f"{card.name}: **{card.value}** ({card.detail})" for card in block.cards)
        case "times":
            return f"{_total(block.seconds)} " + ", ".join(
                f"{name} {value:.1f} s" for name, value in block.seconds.items()
            )
        case "details":
            text = "\n".join(block.items)
            return f"<details><summary>{html.escape(block.text)}</summary>\n\n```\n{text}\n```\n\n</details>"


def _lines(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _statement(item: str) -> tuple[str, str, str]:
    """(kind, statement, evidence) of an item of a result; the statement is the part before the first colon."""
    kind, _, sentence = item.partition("|")
    statement, colon, evidence = sentence.partition(": ")
    return kind, statement, colon + evidence


def _shares(seconds: dict[str, float]) -> list[tuple[str, str, str, str]]:
    """(name, seconds, percent of the sum, colour) of each part of a bar. Colours repeat, so that no part is missing."""
    total = sum(seconds.values()) or 1.0
    return [
        (name, f"{value:.1f} s", f"{100 * value / total:.2f}", colour)
        for (name, value), colour in zip(seconds.items(), cycle(COLOURS), strict=False)
    ]


def _total(seconds: dict[str, float]) -> str:
    return f"{sum(seconds.values()):.0f} s in all:"


def _address(source: Source | None) -> str:
    return source.name if isinstance(source, Path) else _embedded(source)


def _embedded(source: Source) -> str:
    """A data URI with an image file's bytes, or with an image in memory as PNG."""
    if isinstance(source, Path):
        kind, data = TYPES[source.suffix.lower()], source.read_bytes()
    elif isinstance(source, bytes):
        kind, data = "image/png" if source.startswith(b"\x89PNG") else "image/jpeg", source
    else:
        stream = io.BytesIO()
        source.save(stream, "PNG")
        kind, data = "image/png", stream.getvalue()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
