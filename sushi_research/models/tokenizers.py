"""Tokenizers: next to the text encoders of a diffusers folder, or, for a single file, from wherever CLIP's vocabulary is at hand.

All encoders of SD1.5 and SDXL share that vocabulary; their tokenizers differ in the pad token alone, which is a published fact.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sushi_research.errors import UserError, first_line
from sushi_research.models.shapes import published

# The vocabulary by itself, under the MIT licence: what is fetched where nothing else is at hand.
VOCABULARY = "openai/clip-vit-large-patch14"
PAIR = ("vocab.json", "merges.txt")
FILES = (*PAIR, "added_tokens.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")
OFFER = "give --model.tokenizers a folder with CLIP's vocab.json and merges.txt, or any SD1.5 or SDXL model in diffusers format"


@dataclass(frozen=True)
class Tokenizer:
    """The files of a tokenizer; `pad` in place of the pad token that they name, where they are another model's."""

    folder: Path
    pad: str | None = None

    @property
    def files(self) -> list[Path]:
        """The files that decide about the tokens; UserError where there are none."""
        files = [path for name in sorted(FILES) if (path := self.folder / name).is_file()]
        if not files:
            raise UserError(f"{self.folder.parent} has no {self.folder.name} folder: download the model again.")
        return files

    def load(self) -> Any:
        """The `CLIPTokenizer`; UserError where its files are not whole."""
        import transformers

        assert self.files
        given = {} if self.pad is None else {"pad_token": self.pad, "model_max_length": 77}
        wrong = None
        try:
            tokenizer = transformers.CLIPTokenizer.from_pretrained(self.folder, **given)
            merges = _merges(self.folder / "merges.txt")
        except Exception as error:
            # transformers raises many kinds here, and all of them come from the user's files.
            raise UserError(
                f"{self.folder} could not be loaded ({first_line(error)}): download the model again."
            ) from error
        # Every token is a byte, a byte at a word's end, a merge of two others, or one of the two marks. transformers takes a
        # list of merges that was cut as it is, and a caption becomes other tokens.
        if merges is not None and tokenizer.vocab_size != 512 + merges + 2:
            wrong = f"has {tokenizer.vocab_size} tokens and {merges} merges, which do not go together"
        elif tokenizer.model_max_length != 77:
            wrong = f"takes {tokenizer.model_max_length} tokens, and CLIP's has 77 (tokenizer_config.json)"
        if wrong:
            raise UserError(f"{self.folder} {wrong}: download the model again.")
        return tokenizer


def _merges(file: Path) -> int | None:
    """How many merges a merges.txt holds, None where there is none."""
    if not file.is_file():
        return None
    lines = file.read_text("utf-8", "replace").splitlines()
    return sum(bool(line) and not line.startswith("#version") for line in lines)


def folder_of(text_encoder: str) -> str:
    """The folder, in a model in diffusers format, of the tokenizer of `text_encoder` or `text_encoder_2`."""
    return text_encoder.replace("text_encoder", "tokenizer")


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder holds a tokenizer, in either of the two forms that transformers reads."""
    return (folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in PAIR)


def for_single_file(architecture: str, asked: Path | None) -> dict[str, Tokenizer]:
    """The tokenizer of each text encoder: from the folder `asked`, else from the hub's cache, else from the hub.

    `asked` is a folder with the vocabulary or one in diffusers format. UserError where none is at hand.
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
    """The folders of those repositories in the hub's cache that have a tokenizer."""
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(repository, "tokenizer/vocab.json") for repository in repositories]
    roots = [Path(path).parents[1] for path in found if isinstance(path, str)]
    return [root for root in roots if has_vocabulary(root / "tokenizer")]


def _download() -> Path:
    """The folder of CLIP's vocabulary, in the hub's cache or fetched into it: 2 MB."""
    from huggingface_hub import snapshot_download

    try:
        root = Path(snapshot_download(VOCABULARY, allow_patterns=list(FILES)))
    except Exception as error:
        # The hub's errors, those of its network library and those of the disk have no parent in common.
        raise UserError(
            f"a single file holds no tokenizer, none is in the hub's cache, and {VOCABULARY} could not be fetched "
            f"({type(error).__name__}): {OFFER}."
        ) from error
    if not has_vocabulary(root):
        raise UserError(f"the hub's cache has {VOCABULARY} by half ({root}): remove that folder, or {OFFER}.")
    return root
