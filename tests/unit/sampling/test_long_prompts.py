"""Prompts of more than 75 tokens are read in chunks, as ComfyUI and A1111 read them; a shorter negative prompt is repeated."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sushi_research.caches.inputs import fill_caches
from sushi_research.data.captions.run_captions import RunCaptions
from sushi_research.data.samples import Samples
from sushi_research.sampling import pipeline

# The tiny bases have one token per byte.
LONG, SHORT = "".join(chr(97 + n % 26) for n in range(180)), "a cat"
CPU = torch.device("cpu")


@pytest.fixture
def here(setting, architecture):
    return setting(architecture)


def parts(text):
    """(tokenizer, encoder) of each text encoder."""
    values = list(vars(text).values())
    return list(zip(values[::2], values[1::2], strict=True))


def test_each_chunk_is_encoded_by_itself_with_its_own_start_and_end(here):
    text = here.model.load_text(here.base, CPU)
    found = here.model.encode_prompt(text, LONG)
    assert found["hidden"].shape == (3 * 77, here.model.text_shapes(here.base)["hidden"][1])
    # By hand: start, at most 75 tokens, end, and the pad token of each tokenizer.
    expected = []
    for start in (0, 75, 150):
        hidden = []
        for tokenizer, encoder in parts(text):
            words = tokenizer(LONG, truncation=False, add_special_tokens=False, verbose=False).input_ids
            ids = [tokenizer.bos_token_id, *words[start : start + 75], tokenizer.eos_token_id]
            ids += [tokenizer.pad_token_id] * (77 - len(ids))
            output = encoder(torch.tensor([ids]), output_hidden_states=True)
            layer = output.last_hidden_state if len(parts(text)) == 1 else output.hidden_states[-2]
            hidden.append(layer[0])
            if start == 0 and "pooled" in found and tokenizer is parts(text)[-1][0]:
                assert torch.equal(found["pooled"], output.text_embeds[0]), "pooled is the first chunk's"
        expected.append(torch.cat(hidden, dim=-1))
    assert torch.equal(found["hidden"], torch.cat(expected))


def test_a_prompt_that_fits_is_a_caption(here):
    text = here.model.load_text(here.base, CPU)
    for prompt in (SHORT, "", LONG[:75]):
        caption, cut = here.model.encode_caption(text, prompt)
        found = here.model.encode_prompt(text, prompt)
        assert cut == 0 and found.keys() == caption.keys()
        assert all(torch.equal(found[name], caption[name]) for name in found)


def test_the_cache_has_a_long_prompt_next_to_the_caption_that_is_cut(here):
    """The same text may be a caption, which training cuts, and a prompt."""
    sample = here.job.config.sample.model_copy(
        update={"enabled": True, "prompts": [LONG, SHORT], "negative_prompt": LONG[:76]}
    )
    job = replace(here.job, config=here.job.config.model_copy(update={"sample": sample}))
    inputs = replace(here.inputs, config=job.config)
    [item] = inputs.data.items[:1]
    samples = Samples.of([replace(item.sample, caption=LONG)])
    items = replace(inputs.data.items[:1], samples=samples, rows=np.zeros(1, np.int64))
    inputs = replace(inputs, data=replace(inputs.data, items=items, captions=RunCaptions(items)))
    assert inputs.long_prompts == {LONG: 3, LONG[:76]: 2} and sorted(inputs.missing_text_chunks())[-2:] == [2, 3]
    fill_caches(job, inputs)
    assert not len(inputs.missing_text_chunks())
    text = here.model.load_text(here.base, CPU)
    for prompt in (LONG, SHORT, LONG[:76]):
        expected = {name: tensor.half() for name, tensor in here.model.encode_prompt(text, prompt).items()}
        found = inputs.prompt_text(prompt)
        assert all(torch.equal(found[name], expected[name]) for name in expected), len(prompt)
    assert len(here.caches.text(LONG)["hidden"]) == 77 and here.caches.prompt_key(LONG) != here.caches.text_key(LONG)
    assert torch.equal(inputs.prompt_text(SHORT)["hidden"], here.caches.text(SHORT)["hidden"]), (
        "one entry for what fits"
    )


def test_repeating_the_shorter_one_changes_nothing_but_rounding(here):
    """In one batch or one after the other, as A1111 does by default: the same predictions."""
    text = here.model.load_text(here.base, CPU)
    prompt, negative = here.model.encode_prompt(text, LONG), here.model.encode_prompt(text, "z" * 80)
    given = pipeline.embeddings(prompt, negative, here.unet)
    assert (
        given["prompt_embeds"].shape == given["negative_prompt_embeds"].shape == (1, 6 * 77, prompt["hidden"].shape[1])
    )
    noisy, times = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    ids = [torch.tensor([[64.0, 64, 0, 0, 64, 64]])] * (here.model.NAME == "sdxl")

    def predict(hidden, one):
        batch = {name: tensor[None] for name, tensor in one.items()} | {"hidden": hidden}
        with torch.no_grad():
            return here.model.predict(here.unet, noisy, times, batch, *ids, dtype=torch.float32)

    # fp32 sums of six times as many terms.
    torch.testing.assert_close(
        predict(given["prompt_embeds"], prompt), predict(prompt["hidden"][None], prompt), rtol=0, atol=1e-5
    )
    apart = predict(prompt["hidden"][None][:, :77], prompt) - predict(prompt["hidden"][None], prompt)
    assert apart.abs().max() > 1e-4, "more chunks do change it"
