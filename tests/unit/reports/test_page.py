"""A page is the same content as Markdown and as HTML, and the HTML needs no other file."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from PIL import Image

from sushi_research.reports.page import Block, Card, Link, Picture, to_html, to_markdown


@pytest.fixture
def page(tmp_path: Path) -> list[Block]:
    for name in ("wide.png", "photo.jpg"):
        Image.new("RGB", (2, 1), "red").save(tmp_path / name)
    return [
        Block("title", "title"),
        Block("lead", "lead"),
        Block("cards", cards=[Card("name", "value", "detail")]),
        Block("heading", "heading"),
        Block("text", "text"),
        Block("list", items=["item"]),
        Block("result", items=["better|better: evidence"]),
        Block("warning", items=["warned"]),
        Block("table", rows=[["head", "h2"], ["cell|bar", "<&>"]]),
        Block("picture", "alternative", path=tmp_path / "wide.png"),
        Block(
            "pictures",
            pictures=[
                Picture(tmp_path / "photo.jpg", "from <a file>"),
                Picture(Image.new("RGB", (3, 2)), "from memory", marked=True),
            ],
        ),
        Block("times", seconds={"caching": 1.5, "sampling": 2.5}),
        Block("details", "folded", items=["code <&>"]),
        Block("facts", rows=[["name", "<&>"]]),
        Block("links", links=[Link("a <run>", "../runs/a%20run/report.html")]),
        Block("contents"),
    ]


def test_html_embeds_its_pictures_and_escapes_its_text(page: list[Block], tmp_path: Path) -> None:
    text = to_html(page, "tab")
    assert "<title>tab</title>" in text and "<title>title</title>" in to_html(page)
    files = re.findall(r'src="([^"]*)"', text)
    assert re.findall(r'href="([^"]*)"', text) == ["../runs/a%20run/report.html", "#part-4"]
    assert [file.partition(";")[0] for file in files] == ["data:image/png", "data:image/jpeg", "data:image/png"]
    for name, file in zip(("wide.png", "photo.jpg"), files, strict=False):
        assert base64.b64decode(file.partition(",")[2]) == (tmp_path / name).read_bytes()
    assert "url(" not in text and "<&>" not in text and "<a file>" not in text
    assert text.count("<figure") == 2 and text.count('<figure class="marked"') == 1
    assert '<li class="better"><b>better</b>: evidence</li>' in text
    assert "width:37.50%" in text and "width:62.50%" in text, "1.5 and 2.5 of 4 seconds"


def test_markdown_links_files_and_embeds_images_in_memory(page: list[Block]) -> None:
    text = to_markdown(page)
    assert text.startswith("# title\n\nlead\n\n- name: **value** (detail)\n\n## heading\n")
    assert "- better: evidence\n\n- warned\n" in text
    assert "| head | h2 |\n| --- | ---: |\n| cell\\|bar | <&> |" in text
    assert re.findall(r"!\[(.*?)\]\(([^)]{1,10})", text) == [
        ("alternative", "wide.png"),
        ("from <a file>", "photo.jpg"),
        ("from memory", "data:image"),
    ]
    assert "4 s in all: caching 1.5 s, sampling 2.5 s" in text
    assert "<summary>folded</summary>\n\n```\ncode <&>\n```" in text
    assert text.endswith("- name: <&>\n\n- [a <run>](../runs/a%20run/report.html)\n")


def test_more_times_than_colours_all_show() -> None:
    """Colours repeat, so no part is missing from the bar."""
    text = to_html([Block("title", "t"), Block("times", seconds={f"part {n}": 1.0 for n in range(9)})])
    assert text.count("width:11.11%") == 9
