"""Captions beyond 77 tokens: chunk by chunk as programs read prompts, or in kohya's layout; mixed lengths in a micro-batch."""

import pytest
import torch

from sushi_research import conditioning, models
from sushi_research.conditioning import Chunks
from sushi_research.models import loading
from sushi_research.training.text_encoders import TextEncoders

CPU = torch.device("cpu")
# The tiny bases have one token per byte.
LONG = "".join(chr(97 + n % 26) for n in range(180))


@pytest.fixture(params=models.ARCHITECTURES)
def here(request, bases):
    model, base = models.load(request.param), loading.resolve_base(str(bases[request.param]))
    return model, base, model.load_text(base, CPU)


def parts(text):
    """(tokenizer, encoder) of each text encoder."""
    values = list(vars(text).values())
    return list(zip(values[::2], values[1::2], strict=True))


def test_a_caption_has_as_many_chunks_as_it_needs_and_may_have(here):
    model, _, text = here
    for caption, most, chunks, cut in (
        ("a cat", 3, 1, 0),
        (LONG[:75], 3, 1, 0),
        (LONG, 1, 1, 105),
        (LONG, 2, 2, 30),
        (LONG, 9, 3, 0),
    ):
        found, lost = model.encode_caption(text, caption, Chunks(most))
        assert found["hidden"].shape[0] == 77 * chunks and lost == cut
        prompt = model.encode_prompt(text, caption)
        expected = prompt | {"hidden": prompt["hidden"][: 77 * chunks]}
        assert all(torch.equal(found[name], expected[name]) for name in expected), "chunk by chunk as prompts"


def kohya_by_hand(tokenizer, encoder, caption, count, one_encoder):
    """Embeddings and pooled output as kohya's sd-scripts make them, from their description."""
    words = tokenizer(caption, truncation=False, add_special_tokens=False, verbose=False).input_ids[: 75 * count]
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    row = [start, *words, end, *[pad] * (75 * count - len(words))]
    hidden, pooled = [], None
    for number in range(count):
        ids = [start, *row[1 + 75 * number : 76 + 75 * number], row[-1]]
        if pad != end and ids[-2] not in (end, pad):
            ids[-1] = end
        if pad != end and ids[1] == pad:
            ids[1] = end
        output = encoder(torch.tensor([ids]), output_hidden_states=True)
        hidden.append((output.last_hidden_state if one_encoder else output.hidden_states[-2])[0])
        pooled = output.text_embeds[0] if number == 0 and "text_embeds" in output else pooled
    return torch.cat([hidden[0][:1], *(each[1:76] for each in hidden), hidden[-1][76:]]), pooled


@pytest.mark.parametrize("length", [0, 5, 75, 76, 180])
def test_kohyas_layout(here, length):
    model, _, text = here
    found, cut = model.encode_caption(text, LONG[:length], Chunks(2, "kohya"))
    by_hand = [kohya_by_hand(*each, LONG[:length], 2, len(parts(text)) == 1) for each in parts(text)]
    assert (
        torch.equal(found["hidden"], torch.cat([hidden for hidden, _ in by_hand], dim=-1))
        and len(found["hidden"]) == 152
    )
    assert cut == max(0, length - 150)
    if "pooled" in found:
        assert torch.equal(found["pooled"], by_hand[-1][1])


@pytest.mark.parametrize("chunks", [Chunks(), Chunks(3), Chunks(2, "kohya")], ids=["one", "three", "kohya"])
def test_ids_of_a_batch_are_encoded_as_captions_are(here, chunks):
    """What text encoders that are trained give is what the cache holds of the same weights, with the same mask."""
    model, _, text = here
    captions = [LONG, "a cat", "", LONG[:80]]
    expected = conditioning.batch_text([each for each, _ in model.encode_captions(text, captions, chunks)])
    mask = expected.pop("mask", None)
    ids = conditioning.batch_ids([model.token_ids(text, caption, chunks) for caption in captions], chunks.layout)
    encoders = TextEncoders({"text_encoder": torch.nn.Module()}, model, text, chunks=chunks)
    found = encoders(ids)
    assert (mask is None) == ("mask" not in found) and (mask is None or torch.equal(found.pop("mask"), mask))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # Another batch size rounds otherwise in the last bits.
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4)
    zeros = encoders(ids | {"zeros": torch.tensor([False, True, False, False])})
    for name in expected:
        assert not zeros[name][1].any() and torch.equal(zeros[name][[0, 2, 3]], found[name][[0, 2, 3]])


def test_each_sample_of_a_mixed_micro_batch_is_predicted_as_if_alone(here):
    model, base, text = here
    unet = loading.load_unet(base, torch.float32, CPU)
    captions = [LONG, "a cat", LONG[:80]]
    encoded = [model.encode_caption(text, caption, Chunks(3))[0] for caption in captions]
    noisy, times = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([50, 500, 900])
    ids = [torch.tensor([[64.0, 64, 0, 0, 64, 64]])] * (model.NAME == "sdxl")

    def predict(batch, rows):
        with torch.no_grad():
            sizes = [each.repeat(len(rows), 1) for each in ids]
            return model.predict(unet, noisy[rows], times[rows], batch, *sizes, dtype=torch.float32)

    batch = conditioning.batch_text(encoded)
    assert batch["mask"].sum(1).tolist() == [231, 77, 154]
    together = predict(batch, [0, 1, 2])
    for row, one in enumerate(encoded):
        alone = conditioning.batch_text([one])
        assert "mask" not in alone
        # Another batch size rounds otherwise in the last bits; more chunks change the prediction by a hundred times as much.
        torch.testing.assert_close(together[[row]], predict(alone, [row]), rtol=0, atol=1e-4)
    without = predict({name: tensor for name, tensor in batch.items() if name != "mask"}, [0, 1, 2])
    assert (without[1] - together[1]).abs().max() > 1e-3, "zeros are no padding without the mask"
