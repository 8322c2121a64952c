"""inspect_data.py writes one page about a data set as a training would use it."""

from __future__ import annotations

import re
import shutil

import pytest
from PIL import Image
from script_runs import script

from sushi_research.errors import UserError


@pytest.fixture
def pictures(tmp_path, photos):
    """The seven images; a copy of the first, a wide one that the crop halves, and one that is damaged."""
    folder = tmp_path / "3_pictures"
    shutil.copytree(photos, folder)
    shutil.copy(folder / "0.png", folder / "copy of 0.png")
    Image.effect_mandelbrot((400, 64), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(folder / "wide.png")
    (folder / "broken.png").write_bytes((folder / "3.png").read_bytes()[:100])
    for name, caption in (
        ("copy of 0", "1cat, Sitting"),
        ("wide", "1cat, <b>outdoors</b>" + " x" * 80),
        ("broken", "x"),
    ):
        (folder / f"{name}.txt").write_text(caption)
    return tmp_path


def parts_of(page: str) -> dict[str, str]:
    """The HTML below each heading."""
    pieces = re.split(r"<h2[^>]*>(.*?)</h2>", page)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


@pytest.mark.parametrize("architecture", ["sdxl"])
def test_the_page_says_what_a_training_does_with_each_image(trainer, pictures, capsys):
    changes = {"data.path": str(pictures), "train.steps": 1, "captions.shuffle": True, "captions.dropout": 0.3}
    config = trainer.config("seen", changes | {"run.folder": str(trainer.runs / "new")})
    assert script("inspect_data").main(config) == 0
    path = trainer.runs / "new/seen_data.html"
    assert capsys.readouterr().out.splitlines()[-1] == f"written: {path}"
    page = path.read_text()
    parts = parts_of(page)
    assert list(parts) == ["Problems", "Notes", "Captions", "What the network sees", "Copies", "Buckets", "Each image"]
    assert "3_pictures/broken.png: truncated" in parts["Problems"]
    row = re.search(r"<tr><td>3_pictures/wide.png</td>(.*?)</tr>", parts["Each image"])[1]
    uses, pixels, bucket, scale, cut, tokens, chunks, lost = re.findall("<td>(.*?)</td>", row)
    assert (uses, pixels, bucket, scale) == ("3", "400x64", "128x32", "0.50") and cut == "36.0%"
    # The tiny tokenizer has a token for each letter.
    letters = len("1cat,<b>outdoors</b>" + "x" * 80)
    assert (tokens, chunks, lost) == (str(letters), "2", str(letters - 75))
    assert f"{letters} tokens, {letters - 75} cut" in parts["Captions"] and "<b>outdoors" not in page
    copy = re.search(r"<dt>3_pictures/copy of 0.png</dt><dd>(.*?)</dd>", parts["Captions"], re.DOTALL)[1].splitlines()
    assert [line.partition(": ")[0] for line in copy] == ["epoch 1", "epoch 2", "epoch 3"]
    texts = {line.partition(": ")[2] for line in copy}
    assert len(texts) > 1 and texts <= {"1cat, Sitting", "Sitting, 1cat", "(dropped)"}
    assert "<dt>3_pictures/0.png</dt><dd>picture 0 of a</dd>" not in parts["Captions"], (
        "its caption is dropped now and then"
    )
    assert re.search(r" 2  1cat\n", parts["Captions"]) and " 1  sitting\n" in parts["Captions"]
    assert "2 files of the same image" in parts["Copies"] and "copy of 0.png" in parts["Copies"]
    assert parts["What the network sees"].count("decoded from its latents") == 4
    assert parts["Buckets"].count("<figure") == 8 + 1


@pytest.mark.parametrize("architecture", ["sd15"])
def test_a_base_of_the_hub_is_not_downloaded(trainer, monkeypatch, capsys):
    """The page is then without what needs it, and says so; a mistake in a base on this machine is an error."""
    found = {"model.base": "owner/name", "train.steps": 1}
    assert script("inspect_data").main(trainer.config("remote", found)) == 0
    first, second, _ = capsys.readouterr().out.splitlines()[-3:]
    assert (
        first.startswith("the page is without what the network sees") and "owner/name is not on this machine" in first
    )
    assert second.startswith("the page is without tokens")
    parts = parts_of((trainer.runs / "remote_data.html").read_text())
    assert "What the network sees" not in parts and "<th>tokens</th>" not in parts["Each image"]
    with pytest.raises(UserError, match="nowhere"):
        script("inspect_data").main(trainer.config("mistaken", {"model.base": "./nowhere"}))
