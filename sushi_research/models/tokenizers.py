"""Finds and loads tokenizers: from a diffusers folder, or, for a single file, from any copy of CLIP's vocabulary.

All encoders of SD1.5 and SDXL share this vocabulary. Their tokenizers differ only in the pad token, which is published.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sushi_research.errors import UserError, first_line
from sushi_research.models.folder_weights import read_json
from sushi_research.models.settings import ANY, NUMBER, one_of, require_settings
from sushi_research.models.shapes import published
from sushi_research.user_files import read_regular

# CLIP's vocabulary (MIT licence), fetched if there is no other copy.
VOCABULARY = "openai/clip-vit-large-patch14"
PAIR = ("vocab.json", "merges.txt")
FILES = (*PAIR, "added_tokens.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")
# CLIP's largest file has 2 MB.
MOST_BYTES = 16 * 2**20
# What tokenizer_config.json may say. transformers ignores some of these settings, so a value that means another text must not pass.
SIDE = one_of("right", None, because=" (CLIP's text begins at the first position)")
SETTINGS = {
    "tokenizer_class": one_of("CLIPTokenizer", "CLIPTokenizerFast", None),
    "padding_side": SIDE,
    "truncation_side": SIDE,
    "model_max_length": NUMBER,
    "do_lower_case": one_of(True, None),
    "add_prefix_space": one_of(False),
    "add_bos_token": one_of(True, None),
    "add_eos_token": one_of(True, None),
    "split_special_tokens": one_of(False),
    "errors": ANY,  # decoding
    # The tokens are compared after loading.
    **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token", "mask_token", "sep_token", "cls_token"), ANY),
    **dict.fromkeys(("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens"), ANY),
    # What a call gets if it does not say it; ours say it.
    **dict.fromkeys(
        ("max_length", "stride", "truncation", "truncation_strategy", "padding", "pad_to_multiple_of"), ANY
    ),
    # Where the files come from, and settings for decoding and for other kinds of input.
    **dict.fromkeys(("name_or_path", "special_tokens_map_file", "tokenizer_file", "backend", "is_local"), ANY),
    **dict.fromkeys(("local_files_only", "processor_class", "clean_up_tokenization_spaces", "model_input_names"), ANY),
    **dict.fromkeys(("pad_token_type_id", "pad_token_type", "legacy", "use_fast", "trim_offsets"), ANY),
}
# Texts whose tokens show each step: Unicode form, spaces, lower case, splitting, and the two special tokens.
PROBES = ("", "A PHOTO of the caf\u00e9, cafe\u0301's  12\n\tcats:3 can't ($5)")
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

        files, where = self.files, str(self.folder / "tokenizer_config.json")
        said = read_json(self.folder / "tokenizer_config.json") or {}
        require_settings(said, SETTINGS, {}, where, "take CLIP's tokenizer (model.tokenizers)")
        given = {} if self.pad is None else {"pad_token": self.pad, "model_max_length": 77}
        with self._copy(files) as copy:
            try:
                tokenizer = transformers.CLIPTokenizer.from_pretrained(copy, **given)
                merges = _merges(Path(copy, "merges.txt"))
                differs = _differs(tokenizer, Path(copy, "tokenizer.json"))
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
            wrong = f"takes {tokenizer.model_max_length!r} tokens, but CLIP takes 77 (tokenizer_config.json)"
        else:
            wrong = differs or _unusual(tokenizer)
        if wrong:
            raise UserError(
                f"{self.folder} {wrong}: download the model again, or take CLIP's tokenizer (model.tokenizers)."
            )
        return tokenizer

    @contextlib.contextmanager
    def _copy(self, files: Sequence[Path]) -> Iterator[str]:
        """A temporary folder with a copy of the files that are hashed.

        In their own folder the library would read others too, for example those that `fast_tokenizer_files` names, or a
        tokenizer.model.
        """
        with contextlib.ExitStack() as stack:
            try:
                copy = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
                for path in files:
                    Path(copy, path.name).write_bytes(read_regular(path, MOST_BYTES))
            except OSError as error:
                raise UserError(
                    f"{self.folder} cannot be copied to a temporary folder ({error}): make it readable, and check the space for "
                    "temporary files or set TMPDIR to another folder."
                ) from error
            yield copy


def _unusual(tokenizer: Any) -> str | None:
    """How a loaded tokenizer treats the ends of a text in another way than CLIP's; None if it does not."""
    for side in ("padding_side", "truncation_side"):  # tokenizer.json can set them too
        if getattr(tokenizer, side) != "right":
            return f"has the {side} {getattr(tokenizer, side)}, but CLIP's text begins at the first position"
    if tokenizer.pad_token is None:
        return "has no pad token"
    for name, wanted in (("bos_token", "<|startoftext|>"), ("eos_token", "<|endoftext|>")):
        if getattr(tokenizer, name) != wanted:
            return f"has the {name} {getattr(tokenizer, name)!r}, but CLIP's is {wanted}"
    return None


def _differs(tokenizer: Any, file: Path) -> str | None:
    """How a tokenizer.json makes other tokens than `tokenizer`, which was loaded from it; None if it does not.

    transformers takes the vocabulary and the merges from the file and silently replaces the rest by CLIP's own steps.
    """
    import tokenizers

    if not file.is_file():
        return None
    stated = tokenizers.Tokenizer.from_file(str(file))
    stated.no_truncation()
    stated.no_padding()
    if getattr(stated.model, "dropout", None):
        return "drops merges at random (dropout in tokenizer.json)"
    if any(stated.encode(text).ids != tokenizer(text).input_ids for text in PROBES):
        return "has a tokenizer.json that splits text in another way than CLIP's tokenizer"
    return None


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
