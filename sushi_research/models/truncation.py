"""How long texts are in tokens: CLIP reads 75 at a time. Captions are cut, prompts are read in chunks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import pyarrow

from sushi_research.models import loading
from sushi_research.models.new_tokens import with_words

# Tokens of a chunk, besides its start and end token.
CHUNK = 75
# Texts that are tokenized at a time: bounds the memory for their tokens.
_AT_ONCE = 10_000


def token_counts(
    base: loading.Base,
    model: ModuleType,
    texts: Sequence[str] | pyarrow.Array,
    new_tokens: Mapping[str, int] = MappingProxyType({}),
) -> np.ndarray:
    """`count_tokens` with the tokenizers of a base, which are loaded if there is a text. `new_tokens`: the vectors of new words."""
    names = model.TEXT_ENCODERS if len(texts) else []
    tokenizers = [with_words(base.load_tokenizer(name), new_tokens) for name in names]
    return count_tokens(tokenizers, texts)


def count_tokens(tokenizers: Sequence[Any], texts: Sequence[str] | pyarrow.Array) -> np.ndarray:
    """[n] int32: the tokens of each text without start and end token; of two tokenizers the larger number."""
    counts = np.zeros(len(texts), np.int32)
    for tokenizer in tokenizers:
        for start in range(0, len(texts), _AT_ONCE):
            part = texts[start : start + _AT_ONCE]
            part = part.to_pylist() if isinstance(part, pyarrow.Array) else list(part)
            # verbose=False: the caller reports long captions itself.
            ids = tokenizer(part, padding=False, truncation=False, verbose=False).input_ids
            found = counts[start : start + len(part)]
            np.maximum(found, np.fromiter((len(row) - 2 for row in ids), np.int32, len(part)), out=found)
    return counts


def chunks_in(tokens: np.ndarray) -> np.ndarray:
    """The chunks of 75 tokens that hold so many tokens, at least one."""
    return np.maximum(1, -(-tokens // CHUNK))


def chunks_of(
    base: loading.Base,
    model: ModuleType,
    prompts: Iterable[str],
    new_tokens: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, int]:
    """The number of chunks of 75 tokens of each prompt that needs more than one (conditioning.py)."""
    texts = sorted(prompts)
    chunks = chunks_in(token_counts(base, model, texts, new_tokens)).tolist()
    return {text: count for text, count in zip(texts, chunks, strict=True) if count > 1}
