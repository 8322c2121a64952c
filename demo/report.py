"""`report.html`: one self-contained page about a demo run, with its pictures in it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from demo.concepts import Concept
from demo.measure import Measured

STYLE = """
:root { --ink: #1e2b28; --soft: #6d7a76; --line: #e4dccf; --paper: #fbf8f2; --card: #fff; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 30px; margin: 0 0 6px; } h2 { font-size: 19px; margin: 40px 0 12px; }
p.lead { color: var(--soft); margin: 0 0 24px; max-width: 70ch; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 14px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; }
.card b { display: block; font-size: 28px; line-height: 1.25; } .card span { color: var(--soft); font-size: 14px; }
.wide { width: 100%; border: 1px solid var(--line); border-radius: 10px; background: #fff; display: block; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(118px, 1fr)); gap: 12px; }
figure { margin: 0; font-size: 12px; line-height: 1.35; color: var(--soft); } figure img { width: 100%; border-radius: 6px; }
figure.wrong img { outline: 3px solid #d9534f; }
table { border-collapse: collapse; width: 100%; background: var(--card); border: 1px solid var(--line); }
th, td { text-align: right; padding: 7px 12px; border-top: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } thead th { border: 0; color: var(--soft); font-weight: 500; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px; overflow: auto; font-size: 13px; }
.time { display: flex; height: 26px; border-radius: 6px; overflow: hidden; } .time i { display: block; }
.legend { color: var(--soft); font-size: 14px; margin-top: 8px; } .legend i { display: inline-block; width: 11px; height: 11px;
border-radius: 3px; margin: 0 5px 0 14px; } summary { cursor: pointer; color: var(--soft); }
"""
COLOURS = ("#36a3c9", "#2b8a5c", "#f0b23a", "#e4573d", "#8648b0", "#98a4a0", "#4a5a90")


def write_report(
    run: Path, concept: Concept, config: dict[str, Any], before: Measured, after: Measured, facts: dict[str, Any]
) -> None:
    """Writes `report.html` into the run folder; it needs no other file."""
    loss = facts["loss"]
    cards = (
        (
            "the concept, drawn right",
            _change(before.concept.share, after.concept.share),
            f"of {after.concept.total} unseen prompts",
        ),
        (
            "the rest, drawn right",
            _change(before.known.share, after.known.share),
            f"of {after.known.total} prompts it knew",
        ),
        (
            "loss on unseen pictures",
            f"{loss['before']:.3f} &rarr; {loss['after']:.3f}",
            "the same noise before and after",
        ),
        ("adapter", f"{facts['files']['adapter.safetensors'] / 1024:.0f} KB", f"{config['train']['steps']} steps"),
    )
    photos = sorted(
        path for path in Path(config["data"]["path"]).rglob("*") if path.suffix in (".png", ".jpg", ".webp")
    )
    sections = [
        f"<h1>A LoRA learns {html.escape(concept.title)}</h1>",
        f"<p class=lead>{html.escape(_lead(concept, config, len(photos)))}</p>",
        "<div class=cards>" + "".join(_card(*card) for card in cards) + "</div>",
        "<h2>Before, on the way, after</h2>" + _image(Image.open(run / "demo.png")),
        "<h2>What it was shown</h2>" + _strip([(Image.open(path), _caption(path), True) for path in photos]),
        "<h2>Prompts that no photo shows</h2>" + _judged(after),
        "<h2>Scores by word</h2>" + _words(facts),
        "<h2>Curves</h2>" + _image(Image.open(run / "loss.png")),
        "<h2>Time of this start</h2>" + _time(facts["seconds"]),
        "<h2>Files</h2>" + _files(facts["files"]),
        f"<details><summary>The run's config</summary><pre>{html.escape(yaml.safe_dump(config, sort_keys=False))}</pre></details>",
    ]
    title = html.escape(f"{run.name}: {concept.title}")
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}</title><style>{STYLE}</style>"
    page = f"<!doctype html><html lang=en><head>{head}</head><body><main>{''.join(sections)}</main></body></html>\n"
    (run / "report.html").write_text(page, encoding="utf-8")


def _lead(concept: Concept, config: dict[str, Any], photos: int) -> str:
    return (
        f"The base {config['model']['base']} had never seen {concept.title}; the adapter had {config['train']['steps']} steps on "
        f"{photos} pictures. It is judged by prompts with combinations that no picture showed, and by prompts that the base "
        "knew before. Every score is read from the pixels by code that knows how the scenes are drawn; a blurred or "
        "half-right picture counts as wrong."
    )


def _change(before: float, after: float) -> str:
    return f"{before:.0%} &rarr; {after:.0%}"


def _card(name: str, value: str, detail: str) -> str:
    return f"<div class=card><span>{html.escape(name)}</span><b>{value}</b><span>{html.escape(detail)}</span></div>"


def _caption(path: Path) -> str:
    return path.with_suffix(".txt").read_text().strip()


def _data(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _image(picture: Image.Image) -> str:
    return f'<img class=wide alt="" src="{_data(picture)}">'


def _strip(cells: Sequence[tuple[Image.Image, str, bool]]) -> str:
    figures = (
        f'<figure{"" if right else " class=wrong"}><img alt="" src="{_data(picture)}">{html.escape(text)}</figure>'
        for picture, text, right in cells
    )
    return "<div class=strip>" + "".join(figures) + "</div>"


def _judged(after: Measured) -> str:
    cells = []
    for picture, reading, scene in zip(after.drawn, after.readings, after.asked, strict=True):
        right = reading.scene == scene
        seen = "" if right else f" (read as {reading.scene.caption if reading.scene else 'none of these'})"
        cells.append((picture, scene.caption + seen, right))
    wrong = sum(not right for *_, right in cells)
    note = f"{len(cells) - wrong} of {len(cells)} right" + (", the others framed in red." if wrong else ".")
    return f"<p class=lead>{note}</p>" + _strip(cells)


def _words(facts: dict[str, Any]) -> str:
    (concept, concept_after), (known, known_after) = facts["concept_right"], facts["known_right"]
    columns = ("", "concept, base", "with the adapter", "the rest, base", "with the adapter")
    head = "<thead><tr>" + "".join(f"<th>{name}</th>" for name in columns) + "</tr></thead>"
    titles = {"all": "all of it", "none": "none of these"}
    rows = (
        f"<tr><td>{titles.get(word, word)}</td>"
        + "".join(f"<td>{column[word]:.0%}</td>" for column in (concept, concept_after, known, known_after))
        + "</tr>"
        for word in concept
    )
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"


def _time(seconds: dict[str, float]) -> str:
    total = sum(seconds.values())
    bars, legend = "", ""
    for (name, value), colour in zip(seconds.items(), COLOURS, strict=False):
        bars += f"<i style='width:{100 * value / total:.2f}%;background:{colour}'></i>"
        legend += f"<i style='background:{colour}'></i>{html.escape(name)} {value:.1f} s"
    return f"<div class=time>{bars}</div><div class=legend>{total:.0f} s in all:{legend}</div>"


def _files(files: dict[str, int]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{size / 1024:,.1f} KB</td></tr>" for name, size in files.items()
    )
    return f"<table><tbody>{rows}</tbody></table>"
