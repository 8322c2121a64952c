"""Texts that are longer than the 77 tokens of the text encoders: captions are cut, prompts are read in chunks."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType

from sushi_research import conditioning
from sushi_research.models import loading


def texts_cut(base: loading.Base, model: ModuleType, texts: Iterable[str]) -> dict[str, int]:
    """The number of tokens beyond 77 that are cut from each text, for texts that are too long."""
    texts, cut = sorted(texts), {}
    if not texts:
        return cut
    for name in model.TEXT_ENCODERS:
        tokens = conditioning.tokenize(base.load_tokenizer(name), texts)
        for text, lost in zip(texts, tokens.cut, strict=True):
            if lost:
                cut[text] = max(lost, cut.get(text, 0))
    return cut


def chunks_of(base: loading.Base, model: ModuleType, prompts: Iterable[str]) -> dict[str, int]:
    """The number of chunks of 75 tokens of each prompt that needs more than one (conditioning.py)."""
    return {text: 1 + -(-lost // 75) for text, lost in texts_cut(base, model, prompts).items()}
