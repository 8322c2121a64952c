"""The tiny bases: the same from the same seed, and near enough to the real ones for every path through the code."""

import hashlib

import torch

from sushi_research import conditioning
from sushi_research.models import loading
from testing.tiny_base import main, save_tiny_base


def content(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_seed_names_a_base_and_leaves_torchs_generator_alone(bases, tmp_path):
    state = torch.get_rng_state()
    again = content(save_tiny_base(tmp_path / "again", "sd15"))
    assert torch.equal(torch.get_rng_state(), state)
    assert again == content(bases["sd15"])
    other = content(save_tiny_base(tmp_path / "other", "sd15", seed=1))
    assert {name for name in again if again[name] != other[name]} == {
        name for name in again if name.endswith(".safetensors")
    }


def test_it_is_of_its_architecture_and_small(base_folder, architecture):
    assert loading.resolve_base(str(base_folder)).architecture == architecture
    assert sum(path.stat().st_size for path in base_folder.rglob("*") if path.is_file()) < 4 * 2**20


def test_any_caption_tokenises_a_byte_at_a_time(bases):
    tokenizer = loading.resolve_base(str(bases["sdxl"])).load_tokenizer("text_encoder")
    tokens = conditioning.tokenize(tokenizer, ["a\u00e9\u5bff", "x" * 100])
    # Start and end, one byte for a, two for e acute, three for sushi; then the end token again, as padding.
    start, *_ = tokens.ids[0].tolist()
    end = tokens.ids[0, -1].item()
    assert (tokens.ids[0] == end).sum() == 77 - 1 - 6
    assert start not in tokens.ids[0, 1:]
    assert tokens.cut == (0, 100 + 2 - 77)


def test_the_pad_tokens_differ_as_in_sdxl(bases):
    base = loading.resolve_base(str(bases["sdxl"]))
    first, second = (base.load_tokenizer(name) for name in ("text_encoder", "text_encoder_2"))
    assert first.pad_token == "<|endoftext|>" and second.pad_token == "!"
    assert first.pad_token_id != second.pad_token_id


def test_the_command_makes_a_base_once(tmp_path, capsys):
    main(["sd15", str(tmp_path / "base")])
    assert "making a tiny sd15 base" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "base").rglob("*")}
    main(["sd15", str(tmp_path / "base")])
    assert capsys.readouterr().out == ""
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "base").rglob("*")} == before
