"""New tokens on a tokenizer and a text encoder: which texts have them, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sushi_research import conditioning
from sushi_research.models import loading, sdxl
from sushi_research.models.new_tokens import NewTokens, Words, rows_of

CPU = torch.device("cpu")
CHUNKS = conditioning.Chunks(2)


@pytest.fixture
def text(bases: dict[str, Path]) -> Any:
    return sdxl.load_text(loading.resolve_base(str(bases["sdxl"])), CPU)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a mycat", ["mycat"]),
        ("A MyCat, and a<mycat>", ["mycat", "<mycat>"]),
        ("mycats omycat my-cat mycat-2 mycat_", []),
        ("(mycat:1.2) <mycat>s", ["mycat", "<mycat>"]),
        ("<mycat-2>", []),
    ],
)
def test_words_are_found_as_words(text: Any, prompt: str, words: list[str]) -> None:
    tokenizer = text.tokenizer_1
    plain = tokenizer(prompt).input_ids
    new = Words(tokenizer)
    letters = {word: new.add(word, vectors) for word, vectors in (("mycat", 1), ("<mycat>", 2))}
    first = len(tokenizer) - 3
    assert tokenizer(prompt).input_ids == plain, "not active yet"
    new.activate(letters)
    ids = {"mycat": [first], "<mycat>": [first + 1, first + 2]}
    assert [number for number in tokenizer(prompt).input_ids if number >= first] == sum(map(ids.get, words), [])
    new.deactivate(letters)
    assert tokenizer(prompt).input_ids == plain


def test_the_vectors_are_those_of_a_larger_table_and_pooled_at_the_end(text: Any) -> None:
    """As with a table that has more rows, in each chunk of a text; other texts are as before, bit for bit."""
    prompts = ["a mycat on a plate " * 30, "a cat"]
    plain, _ = sdxl.encode_caption(text, prompts[1], CHUNKS)
    generator = torch.Generator().manual_seed(0)
    vectors = [
        {"mycat": torch.randn(3, 32, generator=generator), "a_dog": torch.randn(1, 32, generator=generator)}
        for _ in "12"
    ]
    pairs = ((text.tokenizer_1, text.encoder_1), (text.tokenizer_2, text.encoder_2))
    files = [
        NewTokens(*pair, {name: each[name]}) for name in vectors[0] for pair, each in zip(pairs, vectors, strict=True)
    ]
    for each in files:
        each.activate()
    found, _ = sdxl.encode_caption(text, prompts[0], CHUNKS)
    (same, _), ids = sdxl.encode_caption(text, prompts[1], CHUNKS), sdxl.token_ids(text, prompts[0], CHUNKS)
    assert all(torch.equal(same[name], plain[name]) for name in plain)
    assert len(ids["ids_1"]) == 2 and ids["ids_1"].max() == len(text.tokenizer_1) - 2

    for encoder, own, tokenizer in (
        (text.encoder_1, vectors[0], text.tokenizer_1),
        (text.encoder_2, vectors[1], text.tokenizer_2),
    ):
        rows, inner = rows_of(encoder), getattr(encoder, "text_model", encoder)
        encoder._forward_pre_hooks.clear()
        encoder._forward_pre_hooks_with_kwargs.clear()
        inner.embeddings.token_embedding = torch.nn.Embedding.from_pretrained(
            torch.cat([rows.table.weight, *own.values()])
        )
        inner.eos_token_id = tokenizer.eos_token_id
    expected = sdxl.encode_ids(text, {name: each[None] for name, each in ids.items()})
    for name in found:  # one chunk at a time, or both
        torch.testing.assert_close(expected[name][0], found[name], rtol=0, atol=1e-5)
    for each in files:
        each.deactivate()


def test_a_product_gives_the_gradient_of_a_lookup(text: Any) -> None:
    """In each dtype the values are the rows' own, and the table gets no gradient."""
    values = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    NewTokens(text.tokenizer_1, text.encoder_1, {"mycat": values})
    rows = rows_of(text.encoder_1)
    ids = torch.tensor([[5, -1, -2, -1]])
    own = rows.added[0].requires_grad_()
    found = rows(ids)
    assert torch.equal(found[0], torch.stack([rows.table.weight[5], values[0], values[1], values[0]]))
    found.sum().backward()
    assert torch.equal(own.grad, torch.tensor([[2.0], [1.0]]).expand(2, 32)) and rows.table.weight.grad is None
    rows.is_base = True
    own.data.zero_()
    assert torch.equal(rows(ids), found)
    assert rows.to(torch.bfloat16)(ids).equal(found.to(torch.bfloat16))
