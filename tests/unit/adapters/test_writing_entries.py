"""The tensors of a written adapter: names, scales and shapes of both layouts."""

from __future__ import annotations

import pytest
import torch
from cases import case
from safetensors import safe_open
from safetensors.torch import load_file

from sushi_research.adapters.entries import Difference, Hadamard, Kronecker, LowRank
from sushi_research.adapters.formats.writing import tensors_of, write_entries
from sushi_research.adapters.kohya_format import require_whole
from sushi_research.errors import UserError

QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
VALUE = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"
CONV = "up_blocks.0.resnets.2.conv1"
TEXT = "encoder.layers.0.self_attn.q_proj"


def low(rank, scale=0.5, kernel=(), dtype=torch.float32, **more):
    ones = (1,) * len(kernel)
    return LowRank(
        "x", torch.ones(rank, 6, *kernel, dtype=dtype), torch.ones(8, rank, *ones, dtype=dtype), scale, **more
    )


def test_names_of_both_architectures():
    sd15 = {"unet": {QUERY: low(2)}, "text_encoder": {TEXT: low(2)}}
    sdxl = sd15 | {"text_encoder_2": {f"text_model.{TEXT}": low(2), "text_projection": low(2)}}
    inner = "text_model_encoder_layers_0_self_attn_q_proj"
    block = "transformer_blocks_0_attn1_to_q"
    for architecture, matches, expected in (
        ("sd15", sd15, [f"lora_te_{inner}", f"lora_unet_down_blocks_1_attentions_0_{block}"]),
        (
            "sdxl",
            sdxl,
            [
                f"lora_te1_{inner}",
                f"lora_te2_{inner}",
                "lora_te2_text_projection",
                f"lora_unet_input_blocks_4_1_{block}",
            ],
        ),
    ):
        with case(architecture):
            found = tensors_of(architecture, matches, layout="kohya")
            assert sorted({key.partition(".")[0] for key in found}) == expected
            assert {key.partition(".")[2] for key in found} == {"lora_down.weight", "lora_up.weight", "alpha"}
    found = tensors_of("sdxl", sdxl, layout="peft")
    assert f"unet.{QUERY}.lora_A.weight" in found and f"text_encoder.text_model.{TEXT}.lora_B.weight" in found
    assert f"text_encoder_2.text_model.{TEXT}.lora_A.weight" in found


def test_one_scale_is_an_alpha_and_several_are_in_the_matrices():
    """diffusers gives modules whose alpha differs from the others a wrong scale."""
    one = {"unet": {QUERY: low(2), VALUE: low(2)}, "text_encoder": {TEXT: low(4, 2.0)}}
    found = tensors_of("sd15", one, layout="kohya")
    alphas = {key: value.item() for key, value in found.items() if key.endswith("alpha")}
    assert sorted(alphas.values()) == [1.0, 1.0, 8.0]
    for other in (low(4), low(2, 0.25)):
        found = tensors_of("sd15", {"unet": {QUERY: low(2), VALUE: other}}, layout="kohya")
        assert not any(key.endswith("alpha") for key in found)
        up = [found[key] for key in sorted(found) if "attn2_to_v.lora_up" in key][0]
        assert torch.equal(up, other.up * other.scale)
    found = tensors_of("sd15", one, layout="peft")
    assert torch.equal(found[f"text_encoder.text_model.{TEXT}.lora_B.weight"], torch.full((8, 4), 2.0))


def test_the_other_kinds_have_the_names_of_lycoris():
    square = torch.ones(2, 2)
    entries = {
        QUERY: Hadamard("x", *(torch.ones(8, 3), torch.ones(3, 6)) * 2, scale=0.5),
        VALUE: Kronecker("x", w1=square, w2=torch.ones(4, 3), scale=0.5),
        "conv_in": Kronecker("x", w1=square, w2_a=torch.ones(4, 2), w2_b=torch.ones(2, 3), scale=0.5),
        "conv_norm_out": Difference("x", torch.ones(4), torch.ones(4)),
    }
    found = tensors_of("sd15", {"unet": entries}, layout="kohya")
    parts = {key.rpartition("_")[0] if key.endswith("_x") else key.partition(".")[2] for key in found}
    assert parts == {
        *(f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b")),
        *("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "alpha", "diff", "diff_b"),
    }
    # Two whole matrices have no rank, so programs take a scale of 1.
    assert "lora_unet_" + VALUE.replace(".", "_") + ".alpha" not in found
    assert torch.equal(found["lora_unet_" + VALUE.replace(".", "_") + ".lokr_w1"], square / 2)
    assert found["lora_unet_conv_in.alpha"].item() == 1.0
    for entry, words in (
        (entries[QUERY], "a LoHa.*--rank"),
        (entries["conv_norm_out"], "difference.*: write kohya's layout.$"),
    ):
        with pytest.raises(UserError, match=words):
            tensors_of("sd15", {"unet": {QUERY: entry}}, layout="peft")


def test_magnitudes_have_the_shape_that_readers_tell_the_axis_by():
    for magnitude, kernel, kohya, peft in (
        (torch.ones(8), (), (8, 1), (8,)),
        (torch.ones(8, 1, 1, 1), (3, 3), (8, 1, 1, 1), (1, 8, 1, 1)),
        (torch.ones(1, 6), (), (1, 6), None),
        (torch.ones(1, 6, 1, 1), (3, 3), (1, 6, 1, 1), None),
    ):
        with case((magnitude.shape, kernel)):
            matches = {"unet": {CONV: low(2, kernel=kernel, magnitude=magnitude)}}
            [found] = [value for key, value in tensors_of("sd15", matches, layout="kohya").items() if "dora" in key]
            assert found.shape == kohya
            if peft:
                found = tensors_of("sd15", matches, layout="peft")
                assert found[f"unet.{CONV}.lora_magnitude_vector"].shape == peft
            else:
                with pytest.raises(UserError, match="a magnitude for each input"):
                    tensors_of("sd15", matches, layout="peft")


def test_a_file_has_its_dtype_and_hashes_and_equal_bytes(tmp_path):
    matches = {"unet": {QUERY: low(2, dtype=torch.bfloat16)}}
    for name in ("a", "b"):
        path = tmp_path / f"{name}.safetensors"
        write_entries(path, "sdxl", matches, layout="kohya", dtype=None, metadata={"z": "1", "a": "ü"})
    require_whole(path)
    assert path.read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    found = load_file(path)
    assert {key.partition(".")[2]: value.dtype for key, value in found.items()} == {
        "alpha": torch.float32,
        "lora_down.weight": torch.bfloat16,
        "lora_up.weight": torch.bfloat16,
    }
    with safe_open(path, "pt") as file:
        assert file.metadata()["a"] == "ü" and file.metadata()["format"] == "pt"


def test_a_value_that_the_dtype_cannot_hold_writes_nothing(tmp_path):
    entry = LowRank("x", torch.full((2, 6), 1e5), torch.ones(8, 2))
    with pytest.raises(UserError, match=r"lora_down.weight has values up to 1e\+05, which float16 cannot hold"):
        write_entries(
            tmp_path / "a.safetensors",
            "sd15",
            {"unet": {QUERY: entry}},
            layout="kohya",
            dtype=torch.float16,
            metadata={},
        )
    assert not list(tmp_path.iterdir())


def test_without_a_dtype_every_tensor_keeps_its_own():
    """Programs write magnitudes and biases, and some one of the two matrices, in another dtype than the rest."""
    magnitude = torch.full((8, 1), 1 + 2**-20)
    mixed = LowRank("x", torch.ones(2, 6).half(), torch.full((8, 2), 1 + 2**-20), 1.0, None, magnitude, torch.ones(8))
    folded = low(4, 0.5, dtype=torch.bfloat16)  # another rank, so that scales go into the matrices
    names = {"down": ("lora_down.weight", "lora_A.weight"), "up": ("lora_up.weight", "lora_B.weight")}
    names |= {"magnitude": ("dora_scale", "lora_magnitude_vector"), "bias": ("diff_b", "lora_B.bias")}
    for number, layout in enumerate(("kohya", "peft")):
        with case(layout):
            found = tensors_of("sd15", {"unet": {QUERY: mixed, VALUE: folded}}, layout=layout)
            for part, endings in names.items():
                [key] = [key for key in found if key.endswith(endings[number]) and "attn1" in key]
                value = getattr(mixed, part)
                assert found[key].dtype == value.dtype and torch.equal(found[key].flatten(), value.flatten()), key
                # With one, magnitudes alone are not rounded to it: each multiplies a row or a column of the base's weight.
                narrow = tensors_of("sd15", {"unet": {QUERY: mixed}}, layout=layout, dtype=torch.bfloat16)
                assert narrow[key].dtype == (value.dtype if part == "magnitude" else torch.bfloat16), key
            assert {found[key].dtype for key in found if "attn2" in key} == {torch.bfloat16}


def test_an_alpha_that_no_program_reads_is_not_written():
    for scale in (1e-45, 1e38):
        with case(scale), pytest.raises(UserError, match=r"\.alpha would be .*, which float32 cannot hold"):
            tensors_of("sd15", {"unet": {QUERY: low(8, scale)}}, layout="kohya")
