"""The training of the bases: repeatable pictures, stages that continue exactly, a VAE whose latents are scaled without loss."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from demo.drawing import SQUARE, TALL, WIDE, is_held_out
from demo.make_base import pictures, stage
from demo.painter import load_pipeline, paint
from sushi_research.models import loading
from sushi_research.models.prediction import Prediction
from testing.real_configs import SD15_UNET, SDXL_UNET

END = "<|endoftext|>"


@pytest.fixture
def few(monkeypatch) -> None:
    """A few pictures of each lot."""
    monkeypatch.setattr(pictures, "PLAIN", {SQUARE: 12, WIDE: 4, TALL: 4})
    monkeypatch.setattr(pictures, "SMALL", {SQUARE: 6, WIDE: 2, TALL: 2})
    monkeypatch.setattr(pictures, "CROPPED", 6)
    monkeypatch.setattr(pictures, "STRANGE", 8)


def test_pictures_repeat_and_hold_out_what_they_should(few, tmp_path) -> None:
    first, second = pictures.make_pictures(tmp_path / "a"), pictures.make_pictures(tmp_path / "b")
    again = pictures.make_pictures(tmp_path / "a")
    for canvas, (shown, rows) in first.items():
        assert shown.shape[1:] == (canvas[1], canvas[0], 3) and shown.dtype == np.uint8
        assert np.array_equal(shown, second[canvas][0]) and rows == second[canvas][1]
        assert np.array_equal(shown, again[canvas][0]) and rows == again[canvas][1]
        assert not any(is_held_out(row.scene) for row in rows)
    strange = pictures.make_strange(tmp_path / "a")
    assert np.array_equal(strange, pictures.make_strange(tmp_path / "b")) and strange.std() > 30


def test_rows_tell_true_sizes_and_crops(few, tmp_path) -> None:
    _, rows = pictures.make_pictures(tmp_path)[SQUARE]
    plain = [row.time_ids for row in rows if row.plain]
    sizes = [row.time_ids for row in rows if not row.plain]
    assert all(ids[2:] == (0, 0, 128, 128) and ids[0] == ids[1] >= 128 for ids in plain) and len(plain) == 12
    small = [ids for ids in sizes if ids[0] < 128]
    cropped = [ids for ids in sizes if ids[0] >= 128]
    assert len(small) == 6 and all(ids[2:4] == (0, 0) and max(ids[:2]) <= 64 for ids in small)
    assert len(cropped) == 6
    for height, width, top, left, *target in cropped:
        assert (height, width) in ((128, 192), (192, 128)) and target == [128, 128]
        assert 0 <= top <= height - 128 and 0 <= left <= width - 128
    assert any(ids[2] or ids[3] for ids in cropped)


def small_stage(folder, steps: int = 12) -> tuple[stage.Stage, torch.nn.Module]:
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    return stage.Stage(folder, "small", {"it": module}, steps=steps, lr=1e-2, decay=0.9, every=5), module


def loss_of(module: torch.nn.Module):
    def loss(step: int) -> torch.Tensor:
        x = torch.from_numpy(stage.generator(0, 1, step).standard_normal((4, 3), dtype=np.float32))
        return (module(x) - x[:, :2]).square().mean()

    return loss


@pytest.mark.slow
def test_a_stage_that_was_cut_ends_as_one_that_ran_through(tmp_path) -> None:
    (tmp_path / "through").mkdir()
    (tmp_path / "cut").mkdir()
    through, expected = small_stage(tmp_path / "through")
    through.run(loss_of(expected))
    cut, module = small_stage(tmp_path / "cut")

    def fails(step: int) -> torch.Tensor:
        if step == 8:  # three steps after its last checkpoint
            raise KeyboardInterrupt
        return loss_of(module)(step)

    with pytest.raises(KeyboardInterrupt):
        cut.run(fails)
    resumed, module = small_stage(tmp_path / "cut")
    resumed.restore()
    assert resumed.step == 5
    resumed.run(loss_of(module))
    assert torch.equal(module.weight, expected.weight) and resumed.step == 12
    assert [line["step"] for line in resumed.log] == [5, 10, 12]
    through.averaged()
    resumed.averaged()
    assert torch.equal(module.weight, expected.weight) and torch.equal(module.bias, expected.bias)


@pytest.mark.parametrize("scaled_as", ["sdxl", "sd15"])
def test_the_scale_is_folded_in_without_loss(scaled_as, tmp_path) -> None:
    from demo.make_base import vae

    scaling = vae.SCALING[scaled_as]
    torch.manual_seed(0)
    it = vae.build().eval()
    picture = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    x = stage.pixels(picture)
    with torch.no_grad():
        before = it.encode(x).latent_dist
        generated = it.decode(before.mode()).sample
        mean, std = vae.latent_statistics(it, picture)
        vae.fold_scale(it, mean, std, scaling)
        after = it.encode(x).latent_dist
        assert it.config.scaling_factor == scaling
        latents = after.mode() * scaling
        torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
        # The posterior scales along: its spread, in units of the latents', is what it was.
        torch.testing.assert_close(after.std * scaling, before.std / std[:, None, None], atol=1e-5, rtol=1e-4)
        # fp32 rounding through a decoder of some forty layers.
        torch.testing.assert_close(it.decode(after.mode()).sample, generated, atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    from demo.make_base import tokenizer

    return {pad: tokenizer.make_tokenizer(tmp_path_factory.mktemp("words"), pad) for pad in (END, "!")}


def test_the_tokenizer_is_clips_in_shape(words) -> None:
    first, second = words[END], words["!"]
    assert first.bos_token_id == len(first) - 2 and first.eos_token_id == first.pad_token_id == len(first) - 1
    assert second.pad_token == "!" and second.pad_token_id != second.eos_token_id
    tokens = first.convert_ids_to_tokens(first("Two egg maki on a wooden board, at night").input_ids)
    assert tokens[1:-1] == [f"{word}</w>" for word in "two egg maki on a wooden board , at night".split()]
    assert len(first("one unagi nigiri on a star plate").input_ids) == 9


@given(st.text(max_size=40))
@pytest.mark.slow
def test_any_caption_tokenises(words, caption) -> None:
    tokens = words[END]
    ids = tokens(caption).input_ids
    assert ids[0] == tokens.bos_token_id and ids[-1] == tokens.eos_token_id
    if all(character.isalnum() and character.isascii() and character.islower() for character in caption):
        assert tokens.decode(ids, skip_special_tokens=True).replace(" ", "") == caption


def test_the_unets_have_the_real_ones_blocks() -> None:
    from demo.make_base import unet

    for architecture, theirs in {"sd15": SD15_UNET, "sdxl": SDXL_UNET}.items():
        ours = unet.build(architecture).config
        for key in ("down_block_types", "up_block_types", "addition_embed_type", "use_linear_projection"):
            if key in theirs:
                assert str(_listed(ours[key])) == str(_listed(theirs[key])), (architecture, key)
        assert ours.layers_per_block == 1


def _listed(value):
    return list(value) if isinstance(value, tuple) else value


def test_the_second_encoder_is_projected_and_the_first_is_not(words) -> None:
    from demo.make_base import text

    first = text.build(words[END], projected=False)
    second = text.build(words["!"], projected=True)
    ids = text.token_ids(words["!"], ["one egg maki on a blue plate"])
    assert first.config.eos_token_id == words[END].eos_token_id
    assert second(ids).text_embeds.shape == (1, 64) and first(ids).last_hidden_state.shape == (1, 77, 64)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sdxl", "sd15"])
def test_the_stages_after_the_vae_make_a_pipeline(architecture, monkeypatch, tmp_path) -> None:
    """Two steps of each, on a few pictures: the finished folder is a base that the trainer takes and diffusers draws with."""
    from demo.make_base import text, unet, vae, zero_snr

    monkeypatch.setattr(pictures, "PLAIN", {SQUARE: 24, WIDE: 12, TALL: 12})
    monkeypatch.setattr(pictures, "SMALL", {SQUARE: 2, WIDE: 2, TALL: 2})
    monkeypatch.setattr(pictures, "CROPPED", 2)
    for module in (text, unet, zero_snr):
        monkeypatch.setattr(module, "VALIDATION", 4)
        monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(text, "STEPS", 2)
    monkeypatch.setattr(unet, "STEPS", {architecture: 2})
    monkeypatch.setattr(zero_snr, "STEPS", 2)
    untrained = vae.build()
    untrained.register_to_config(scaling_factor=vae.SCALING[architecture])
    untrained.save_pretrained(tmp_path / f"vae_{architecture}")
    threads = torch.get_num_threads()
    try:
        text.main(tmp_path)
        unet.main(architecture, tmp_path)
        if architecture == "sd15":
            zero_snr.main(tmp_path)
    finally:
        torch.set_num_threads(threads)
    for name in ("sd15", "sd15_v") if architecture == "sd15" else ("sdxl",):
        base = loading.resolve_base(str(tmp_path / name))
        assert base.architecture == architecture
        assert base.prediction == (Prediction("v_prediction", True) if name == "sd15_v" else Prediction())
        result = json.loads((tmp_path / f"unet_{name}.json").read_text())
        assert result["steps"] == 2 and result["bytes"] < 8_000_000
        assert "_name_or_path" not in (tmp_path / name / "unet/config.json").read_text()
        [generated] = paint(load_pipeline(tmp_path / name), ["one egg maki on a blue plate"], steps=2)
        assert generated.size == SQUARE
