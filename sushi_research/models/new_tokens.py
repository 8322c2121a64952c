"""New tokens: words of captions and prompts that stand for vectors of their own (textual inversion, arXiv 2208.01618).

A word becomes as many ids as it has vectors, beyond those of the tokenizer (`Words`), and a text encoder looks these ids up in
`Rows` in place of its own table, which stays as it is. CLIP's tokenizer reads upper and lower case alike, so these words are, too.

transformers pools at the largest id where the config's eos_token_id is 2, as in the published ones of SD1.5 and SDXL. An id beyond
the vocabulary would then be taken for the end of the text. So an encoder gets them as negative ids (-1 is the first), which are
never the largest; where the config names the real end token, they are not that one either.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

# A letter of Unicode's last private plane for each id: no text of a user has it, and no step of the tokenizer changes it.
_FIRST_LETTER = 0x100000
# What continues a word of letters: "cat" is not found in "cats".
_INSIDE = r"[\p{L}\p{N}_-]"


class Words:
    """The new words of a tokenizer, which reads those that are active as their ids. It changes the tokenizer in place."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.first = tokenizer, len(tokenizer)
        self._plain = tokenizer.backend_tokenizer.normalizer
        self._letters: dict[str, str] = {}
        self._active: dict[str, str] = {}

    def add(self, word: str, vectors: int) -> str:
        """Adds a word with as many ids as it has vectors; returns the letters that stand for them. It is not active yet."""
        from tokenizers import AddedToken

        start = len(self.tokenizer) - self.first
        letters = "".join(chr(_FIRST_LETTER + start + number) for number in range(vectors))
        # "normalized": it is found after the normalizer, which puts the letters in.
        self.tokenizer.add_tokens([AddedToken(letter, normalized=True) for letter in letters])
        ids = self.tokenizer.convert_tokens_to_ids(list(letters))
        assert ids == list(range(self.first + start, self.first + start + vectors)), (
            "the tokenizer has other new tokens"
        )
        return letters

    def activate(self, words: Mapping[str, str]) -> None:
        """From now on these words are read as their letters' ids."""
        self._set({**self._active, **words})

    def deactivate(self, words: Collection[str]) -> None:
        """From now on these words are read as the tokenizer alone reads them."""
        self._set({word: letters for word, letters in self._active.items() if word not in words})

    def _set(self, active: Mapping[str, str]) -> None:
        from tokenizers import Regex, normalizers

        self._active = dict(active)
        longest = sorted(active, key=lambda word: (-len(word), word))  # "<cat>" is not "cat" between two signs
        steps = [normalizers.Replace(Regex(_pattern(word)), active[word]) for word in longest]
        self.tokenizer.backend_tokenizer.normalizer = (
            normalizers.Sequence([self._plain, *steps]) if steps else self._plain
        )


def _pattern(word: str) -> str:
    """The regular expression for a word in a text in lower case."""
    before = f"(?<!{_INSIDE})" if word[0].isalnum() else ""
    after = f"(?!{_INSIDE})" if word[-1].isalnum() or word[-1] in "_-" else ""
    return before + re.escape(word.lower()) + after


class Rows(nn.Module):
    """In place of a text encoder's token embedding: the rows of the table, and for negative ids those of new tokens.

    `added` are the vectors of each new token, [vectors, width]. While `is_base`, those that they began at are used instead.
    """

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table
        self.names: list[str] = []
        self.added, self.initial = nn.ParameterList(), nn.ParameterList()
        self.is_base = False

    def add(self, name: str, values: torch.Tensor, *, is_trained: bool) -> None:
        """Adds the vectors of a token: trainable, or in the dtype of the table."""
        like = self.table.weight
        values = values.detach().to(like.device)
        self.names.append(name)
        own = values.float() if is_trained else values.to(like.dtype)
        self.added.append(nn.Parameter(own.clone(), requires_grad=is_trained))
        self.initial.append(nn.Parameter(values.to(like.dtype, copy=True), requires_grad=False))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors [..., width] of ids [...], in the dtype of the table."""
        known = self.table(ids.clamp(min=0))
        rows = torch.cat([each.to(known.dtype) for each in (self.initial if self.is_base else self.added)])
        # A product with ones and zeros, which is exact. The gradient of a lookup is not the same twice on a GPU, or waits for it.
        places = torch.arange(-1, -1 - len(rows), -1, device=ids.device)
        return torch.where((ids < 0)[..., None], (ids[..., None] == places).to(rows.dtype) @ rows, known)


def rows_of(encoder: nn.Module) -> Rows | None:
    """The rows of a text encoder's new tokens; None if it has none."""
    return next((module for module in encoder.modules() if isinstance(module, Rows)), None)


def install(encoder: Any, first: int) -> Rows:
    """Puts `Rows` in place of a text encoder's token embedding, once. Ids from `first` on are those of new tokens."""
    if (rows := rows_of(encoder)) is not None:
        return rows
    embeddings = getattr(encoder, "text_model", encoder).embeddings
    rows = Rows(embeddings.token_embedding)
    embeddings.token_embedding = rows

    def renumber(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids, *rest = args
        return (torch.where(ids >= first, first - 1 - ids, ids), *rest), kwargs

    encoder.register_forward_pre_hook(renumber, with_kwargs=True)
    return rows


class NewTokens:
    """New tokens of a file on one tokenizer and its text encoder. They change nothing until they are activated."""

    def __init__(self, tokenizer: Any, encoder: Any, vectors: Mapping[str, torch.Tensor]) -> None:
        """`vectors`: those of each word, [n, width]."""
        # The state of a tokenizer is kept with it, because several files may be on it.
        words = getattr(tokenizer, "_new_words", None) or Words(tokenizer)
        tokenizer._new_words = self._words = words
        rows = install(encoder, words.first)
        self._letters = {}
        for word, values in vectors.items():
            self._letters[word] = words.add(word, len(values))
            rows.add(word, values, is_trained=False)

    def activate(self) -> None:
        """From now on texts have the tokens."""
        self._words.activate(self._letters)

    def deactivate(self) -> None:
        """From now on texts are read as without them."""
        self._words.deactivate(self._letters)


def with_words(tokenizer: Any, vectors: Mapping[str, int]) -> Any:
    """The tokenizer, which from now on reads words as so many new ids: those of the training, or to count a text's tokens."""
    if vectors:
        words = Words(tokenizer)
        words.activate({word: words.add(word, count) for word, count in vectors.items()})
    return tokenizer
