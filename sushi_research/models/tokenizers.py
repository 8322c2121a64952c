"""Finds and loads tokenizers: from a diffusers folder, or, for a single file, from any copy of CLIP's vocabulary.

All encoders of SD1.5 and SDXL share this vocabulary. Their tokenizers differ only in the pad token, which is published.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sushi_research.errors import UserError, first_line
from sushi_research.models.shapes import published

# CLIP's vocabulary (MIT licence), fetched if there is no other copy.
VOCABULARY = "openai/clip-vit-large-patch14"
PAIR = ("vocab.json", "merges.txt")
FILES = (*PAIR, "added_tokens.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")
OFFER = "give --model.tokenizers a folder with CLIP's vocab.json and merges.txt, or any SD1.5 or SDXL model in diffusers format"


@dataclass(frozen=True)
class Tokenizer:
    """The files of a tokenizer. `pad` replaces their pad token if they belong to another model."""

    folder: Path
    pad: str | None = None

    @property
    def files(self) -> list[Path]:
        """The files that determine the tokens; UserError if there are none."""
        files = [path for name in sorted(FILES) if (path := self.folder / name).is_file()]
        if not files:
            raise UserError(f"{self.folder.parent} has no {self.folder.name} folder: download the model again.")
        return files

    def load(self) -> Any:
        """The `CLIPTokenizer` of exactly `files`; UserError if they are incomplete or inconsistent."""
        import transformers

        files = self.files
        given = {} if self.pad is None else {"pad_token": self.pad, "model_max_length": 77}
        try:
            # A copy of the files that are hashed: in their own folder the library would read others too, for example those that
            # `fast_tokenizer_files` names, or a tokenizer.model.
            with tempfile.TemporaryDirectory() as copy:
                for path in files:
                    shutil.copyfile(path, Path(copy, path.name))
                tokenizer = transformers.CLIPTokenizer.from_pretrained(copy, **given)
                merges = _merges(Path(copy, "merges.txt"))
        except Exception as error:
            # transformers raises many error types here, all caused by the user's files.
            raise UserError(
                f"{self.folder} could not be loaded ({first_line(error)}): download the model again."
            ) from error
        # The vocabulary has 256 bytes, 256 bytes at the end of a word, one token per merge, and two special tokens.
        # transformers accepts a truncated list of merges, which would silently change the tokens of captions.
        wrong = None
        if merges is not None and tokenizer.vocab_size != 512 + merges + 2:
            wrong = f"has {tokenizer.vocab_size} tokens and {merges} merges, which do not fit together"
        elif tokenizer.model_max_length != 77:
            wrong = f"takes {tokenizer.model_max_length} tokens, but CLIP takes 77 (tokenizer_config.json)"
        if wrong:
            raise UserError(f"{self.folder} {wrong}: download the model again.")
        return tokenizer


def _merges(file: Path) -> int | None:
    """Number of merges in a merges.txt; None if there is no such file."""
    if not file.is_file():
        return None
    lines = file.read_text("utf-8", "replace").splitlines()
    return sum(bool(line) and not line.startswith("#version") for line in lines)


def folder_of(text_encoder: str) -> str:
    """The tokenizer's folder name in diffusers format, for `text_encoder` or `text_encoder_2`."""
    return text_encoder.replace("text_encoder", "tokenizer")


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder holds a tokenizer in one of the two formats that transformers reads."""
    return (folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in PAIR)


def for_single_file(architecture: str, asked: Path | None) -> dict[str, Tokenizer]:
    """The tokenizer of each text encoder: from the folder `asked`, else from the hub's cache, else from the hub.

    `asked` is a folder with the vocabulary or a model in diffusers format. UserError if no tokenizer is found.
    """
    facts = published(architecture)
    roots = [asked] if asked else _cached(facts["repositories"]) or [_download()]
    found = {}
    for name, pad in facts["pad_tokens"].items():
        folders = [folder for root in roots for folder in (root / folder_of(name), root / "tokenizer", root)]
        folder = next(filter(has_vocabulary, folders), None)
        if folder is None:
            raise UserError(f"model.tokenizers: {asked} has no tokenizer (no vocab.json with merges.txt): {OFFER}.")
        found[name] = Tokenizer(folder, pad)
    return found


def _cached(repositories: list[str]) -> list[Path]:
    """The folders in the hub's cache of those of the repositories that have a tokenizer."""
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(repository, "tokenizer/vocab.json") for repository in repositories]
    roots = [Path(path).parents[1] for path in found if isinstance(path, str)]
    return [root for root in roots if has_vocabulary(root / "tokenizer")]


def _download() -> Path:
    """The folder of CLIP's vocabulary (2 MB) in the hub's cache; downloads it if needed."""
    from huggingface_hub import snapshot_download

    try:
        root = Path(snapshot_download(VOCABULARY, allow_patterns=list(FILES)))
    except Exception as error:
        # The errors of the hub, its network library and the disk have no common base class.
        raise UserError(
            f"a single file holds no tokenizer, none is in the hub's cache, and {VOCABULARY} could not be fetched "
            f"({type(error).__name__}): {OFFER}."
        ) from error
    if not has_vocabulary(root):
        raise UserError(f"the hub's cache has an incomplete {VOCABULARY} ({root}): remove that folder, or {OFFER}.")
    return root
