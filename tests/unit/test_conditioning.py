"""Conditioning equals the diffusers pipelines' own, bit for bit; the original recipe is a separate option."""

import pytest
import torch

from sushi_research import conditioning
from sushi_research.models import loading, sd15, sdxl

CAPTIONS = ["a cat", "", "salmon nigiri, two pieces, on a black plate", "long " * 60, "日本語 & emoji 🍣"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sdxl_base(bases):
    return loading.resolve_base(str(bases["sdxl"]))


@pytest.fixture(scope="module")
def sdxl_text(sdxl_base):
    return sdxl.load_text(sdxl_base, CPU)


@pytest.fixture(scope="module")
def sdxl_pipeline(bases):
    import diffusers

    return diffusers.StableDiffusionXLPipeline.from_pretrained(bases["sdxl"])


@pytest.fixture(scope="module")
def sd15_text(bases):
    return sd15.load_text(loading.resolve_base(str(bases["sd15"])), CPU)


@pytest.fixture(scope="module")
def sd15_pipeline(bases):
    import diffusers

    return diffusers.StableDiffusionPipeline.from_pretrained(bases["sd15"])


def test_sdxl_equals_the_pipeline(sdxl_text, sdxl_pipeline):
    for caption in CAPTIONS:
        ours, _ = sdxl.encode_caption(sdxl_text, caption)
        hidden, _, pooled, _ = sdxl_pipeline.encode_prompt(caption, device=CPU, do_classifier_free_guidance=False)
        assert ours["hidden"].shape == (77, 64) and ours["pooled"].shape == (32,)
        assert torch.equal(ours["hidden"], hidden[0]), caption
        assert torch.equal(ours["pooled"], pooled[0]), caption


def test_sdxl_negative_prompt_equals_the_pipeline(sdxl_text, sdxl_pipeline):
    _, negative, _, pooled = sdxl_pipeline.encode_prompt(
        "a cat", negative_prompt="blurry", device=CPU, do_classifier_free_guidance=True
    )
    ours, _ = sdxl.encode_caption(sdxl_text, "blurry")
    assert torch.equal(ours["hidden"], negative[0]) and torch.equal(ours["pooled"], pooled[0])


def test_sd15_equals_the_pipeline(sd15_text, sd15_pipeline):
    for caption in CAPTIONS:
        ours, _ = sd15.encode_caption(sd15_text, caption)
        hidden, _ = sd15_pipeline.encode_prompt(caption, CPU, 1, do_classifier_free_guidance=False)
        assert ours["hidden"].shape == (77, 32)
        assert torch.equal(ours["hidden"], hidden[0]), caption


def test_sd15_clip_skip_two_is_the_penultimate_layer_with_the_final_norm(sd15_text):
    ids = conditioning.tokenize(sd15_text.tokenizer, ["a cat"]).ids
    states = sd15_text.encoder(ids, output_hidden_states=True).hidden_states
    expected = sd15_text.encoder.final_layer_norm(states[-2])
    ours, _ = sd15.encode_caption(sd15_text, "a cat", clip_skip=2)
    assert torch.equal(ours["hidden"], expected[0])
    first, _ = sd15.encode_caption(sd15_text, "a cat", clip_skip=1)
    assert torch.equal(first["hidden"], sd15_text.encoder.final_layer_norm(states[-1])[0])
    assert not torch.equal(first["hidden"], ours["hidden"])


def test_founding_recipe_takes_the_normalised_last_layer_of_the_first_encoder(sdxl_text):
    ids_1 = conditioning.tokenize(sdxl_text.tokenizer_1, ["a cat"]).ids
    ids_2 = conditioning.tokenize(sdxl_text.tokenizer_2, ["a cat"]).ids
    ours, _ = sdxl.encode_caption(sdxl_text, "a cat", text_encoder_1_layer="last")
    default, _ = sdxl.encode_caption(sdxl_text, "a cat")
    assert torch.equal(ours["hidden"][:, :32], sdxl_text.encoder_1(ids_1)[0][0])
    # Only the first encoder's half differs.
    assert not torch.equal(ours["hidden"][:, :32], default["hidden"][:, :32])
    second = sdxl_text.encoder_2(ids_2, output_hidden_states=True)
    assert torch.equal(ours["hidden"][:, 32:], second.hidden_states[-2][0])
    assert torch.equal(ours["pooled"], default["pooled"])


def test_each_tokenizer_pads_with_its_own_token(sdxl_text):
    first = conditioning.tokenize(sdxl_text.tokenizer_1, ["ab"]).ids[0]
    second = conditioning.tokenize(sdxl_text.tokenizer_2, ["ab"]).ids[0]
    start, end = sdxl_text.tokenizer_1.bos_token_id, sdxl_text.tokenizer_1.eos_token_id
    assert first[0] == start and first[3] == end and set(first[4:].tolist()) == {end}
    assert torch.equal(first[:4], second[:4]) and set(second[4:].tolist()) == {0}


def test_long_captions_are_cut_and_counted(sdxl_text):
    # One token per byte, and a start and an end token: 75 letters fill the 77 positions.
    tokens = conditioning.tokenize(sdxl_text.tokenizer_1, ["a" * 75, "a" * 76, "a" * 100, ""])
    assert tokens.ids.shape == (4, 77)
    assert tokens.cut == (0, 1, 25, 0)


def test_captions_do_not_depend_on_their_neighbours(sdxl_text):
    ids = [conditioning.tokenize(t, CAPTIONS).ids for t in (sdxl_text.tokenizer_1, sdxl_text.tokenizer_2)]
    hidden, pooled = conditioning.encode_two(sdxl_text.encoder_1, sdxl_text.encoder_2, *ids)
    alone, _ = sdxl.encode_caption(sdxl_text, CAPTIONS[2])
    # Matrix products of another batch size may round otherwise in the last bits.
    assert torch.allclose(hidden[2], alone["hidden"], atol=1e-5)
    assert torch.allclose(pooled[2], alone["pooled"], atol=1e-5)


def test_time_ids_keep_every_integer():
    ids = conditioning.time_ids([(1023, 1537, 3, 2049, 1024, 3001), (1, 2, 3, 4, 5, 6)])
    assert ids.dtype == torch.float32
    assert ids.tolist() == [[1023, 1537, 3, 2049, 1024, 3001], [1, 2, 3, 4, 5, 6]]


def test_time_ids_follow_the_pipeline_order(sdxl_pipeline):
    expected = sdxl_pipeline._get_add_time_ids((700, 500), (11, 22), (64, 96), torch.float32, 32)
    assert torch.equal(conditioning.time_ids([(700, 500, 11, 22, 64, 96)]), expected)
