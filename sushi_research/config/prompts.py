"""Prompts of sample images: texts, or mappings with settings of their own; in a config, in a YAML list, or one per line of a file.

A line may end with kohya's options (sd-scripts, `library/train_util.py`, `line_to_prompt_dict`):

    a photo of sks dog, on a beach --w 1024 --h 768 --s 28 --l 6.5 --d 7 --n blurry, lowres

Lines that are empty or begin with # are skipped. `--l` is the guidance scale there and here; the LoRA scale of a prompt needs YAML.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_serializer

from sushi_research import caption_text
from sushi_research.config.keys import keys_of, listed
from sushi_research.config.mistakes import MOST_PROBLEMS, Setting, sentence, unknown
from sushi_research.config.section import Guidance, ImageSide, SamplingSteps, Section, Seed
from sushi_research.config.yaml12 import parse_yaml, show
from sushi_research.errors import UserError, UserErrors
from sushi_research.user_files import UnreadableFile, expand_path, read_regular

# kohya's option -> our key, and how its text becomes a value.
LINE_OPTIONS = {
    "w": ("width", int),
    "h": ("height", int),
    "s": ("steps", int),
    "l": ("guidance", float),
    "d": ("seed", int),
    "n": ("negative_prompt", str),
}
_LINE_END = re.compile("\r\n|\r|\n")
_OPTION = re.compile(r"\s--(?=\S)")
# A thousand prompts have about 200 kB.
_MOST_BYTES = 2**20


class Prompt(Section):
    """A prompt of sample images; null takes the value of the other settings."""

    prompt: str = Field(description="Text of the prompt")
    negative_prompt: str | None = Field(None, description="Negative prompt")
    seed: Seed | None = Field(None, description="The seed of its only image")
    width: ImageSide | None = Field(None, description="Width in pixels")
    height: ImageSide | None = Field(None, description="Height in pixels")
    steps: SamplingSteps | None = Field(None, description="Denoising steps")
    guidance: Guidance | None = Field(None, description="Guidance scale; 1 = none")
    scale: Annotated[float, Field(ge=-1000, le=1000)] | None = Field(None, description="LoRA scale; 1 = as trained")

    @model_serializer
    def _given(self) -> dict[str, Any]:
        return self.given

    @property
    def given(self) -> dict[str, Any]:
        """The settings that are not null, by name."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if value is not None}


def schema_extra() -> dict[str, str]:
    """What --help and errors say of a list of prompts."""
    return {"allowed": f"a list such as [a, b], whose entries are {_allowed()}"}


def _allowed() -> str:
    settings = listed(name for name in Prompt.model_fields if name != "prompt")
    return f"text, or a mapping with prompt and any of {settings}"


def read_entries(value: Any) -> Any:
    """A validator of a list of prompts: mappings become `Prompt`, texts stay. Raises UserError with one sentence per mistake."""
    if not isinstance(value, list):
        return value
    found, problems = [], []
    for number, entry in enumerate(value, 1):
        if isinstance(entry, dict):
            try:
                found.append(_from_mapping(entry, f"in entry {number}"))
            except UserError as error:
                problems += str(error).split("\n")
        else:
            found.append(entry)
    if problems:
        raise UserError("; ".join(problems[:MOST_PROBLEMS]))
    return found


def as_prompts(entries: Sequence[str | Prompt]) -> list[Prompt]:
    """The entries of a list of prompts, as `Prompt`."""
    return [Prompt(prompt=entry) if isinstance(entry, str) else entry for entry in entries]


def texts_of(entries: Sequence[str | Prompt]) -> list[str]:
    """Every prompt and negative prompt of a list of prompts."""
    return [text for each in as_prompts(entries) for text in (each.prompt, each.negative_prompt) if text is not None]


def read_prompts(path: str, key: str) -> list[Prompt]:
    """The prompts in a file: a YAML list (.yaml, .yml, .json), or text with one prompt per line (.txt).

    Raises UserError if the file cannot be read or has no prompt, and UserErrors with one sentence for each mistake in it. `key` is
    the setting that names the file.
    """
    file = Path(expand_path(path, key=key))
    readers = {".txt": _from_lines, ".yaml": _from_yaml, ".yml": _from_yaml, ".json": _from_yaml}
    if file.suffix.lower() not in readers:
        raise UserError(
            f"{key} is {path}: give a file that ends in .txt (one prompt per line) or .yaml (a list of prompts)."
        )
    try:
        text = caption_text.decode(read_regular(file, _MOST_BYTES))
    except UnreadableFile as error:
        raise UserError(f"{key}: {error}") from None
    except caption_text.NotText as error:
        raise UserError(f"{path} {error.reason}: save it as UTF-8.") from None
    found, problems = [], []
    for source, entry in readers[file.suffix.lower()](text, path):
        try:
            found.append(_from_entry(entry, source))
        except UserError as error:
            problems += str(error).split("\n")
    if problems:
        raise _errors(problems)
    if not found:
        raise UserError(f"{path} has no prompt: write one, or remove {key}.")
    return found


def _errors(problems: Sequence[str]) -> UserError:
    if len(problems) == 1:
        return UserError(problems[0])
    shown = list(problems[:MOST_PROBLEMS])
    return UserErrors([*shown, *([f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else [])])


def _from_yaml(text: str, path: str) -> Iterator[tuple[str, Any]]:
    """Yields (source, entry) of each entry of a YAML list."""
    entries = parse_yaml(text, path)
    if entries is not None and not isinstance(entries, list):
        raise UserError(f"{path} holds {show(entries)}: write a list of prompts, each after a hyphen.")
    for number, entry in enumerate(entries or [], 1):
        yield f"in entry {number} of {path}", entry


def _from_lines(text: str, path: str) -> Iterator[tuple[str, Any]]:
    """Yields (source, entry) of each line with a prompt; the entry is a UserError if its options are not understood."""
    for number, line in enumerate(_LINE_END.split(text), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            source = f"in line {number} of {path}"
            try:
                yield source, _from_line(line.strip(), source)
            except UserError as error:
                yield source, error


def _from_line(line: str, source: str) -> dict[str, Any]:
    """The prompt and the options of one line, as a mapping with our keys."""
    prompt, *words = _OPTION.split(line)
    if prompt.startswith("--"):
        raise UserError(
            f"a prompt is missing {source}, which begins with {prompt.split()[0]}: options follow the prompt."
        )
    entry: dict[str, Any] = {"prompt": prompt.strip()}
    for word in words:
        option, _, text = word.partition(" ")
        if option.lower() not in LINE_OPTIONS:
            known = ", ".join(f"--{name} ({key})" for name, (key, _) in LINE_OPTIONS.items())
            raise UserError(
                f"unknown option --{option} {source}: a line takes {known}; a YAML list takes the scale too."
            )
        key, kind = LINE_OPTIONS[option.lower()]
        if key in entry:
            raise UserError(f"--{option} is given twice {source}: keep one.")
        try:
            entry[key] = kind(text.strip())
        except ValueError:
            entry[key] = text.strip()  # the sentence about the value says what it must be
    return entry


def _from_entry(entry: Any, source: str) -> Prompt:
    """A prompt from an entry of a file, with its texts checked."""
    if isinstance(entry, UserError):
        raise entry
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, dict):
        raise UserError(f"{show(entry)} {source} is not a prompt: write {_allowed()}.")
    found = _from_mapping(entry, source)
    for text in (found.prompt, found.negative_prompt or ""):
        if reason := caption_text.problem(text):
            raise UserError(f"the prompt {text[:60]!r} {source} {reason}: correct it.")
    return found


def _from_mapping(entry: dict[Any, Any], source: str) -> Prompt:
    """A prompt from a mapping. Raises UserErrors with one sentence for each mistake; `source` is where it is."""
    keys = keys_of(Prompt.model_json_schema())
    problems = [unknown(str(name), source, keys, True) for name in entry if name not in keys.leaves]
    settings = {name: Setting(value, source, 0) for name, value in entry.items() if name in keys.leaves}
    if "prompt" not in settings:
        problems.append(f"prompt is missing {source}: add it, the text of the prompt")
        settings["prompt"] = Setting("", source, 0)
    try:
        found = Prompt.model_validate({name: setting.value for name, setting in settings.items()})
    except ValidationError as error:
        errors = {str(each["loc"][0]): each for each in reversed(error.errors())}
        problems += [sentence(each, keys, settings) for each in errors.values()]
    else:
        if found.guidance == 1 and found.negative_prompt:
            because = "has no effect while its guidance is 1, which is none"
            problems.append(f"negative_prompt {source} {because}: set another guidance, or remove it")
    if problems:
        raise _errors(problems)
    return found
