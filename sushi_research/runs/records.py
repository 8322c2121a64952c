"""The JSON files of a run folder, checked where they are read.

A model names what readers rely on. Further keys are allowed: a file of an older version, or of a later one, may have others. Types
are strict (true is no number, 3.0 is no step), and numbers are finite and of a size that a run can reach.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from sushi_research.config.yaml12 import read_yaml
from sushi_research.errors import UserError, first_line
from sushi_research.user_files import UnreadableFile, parse_json, read_regular

# Far above what any run writes: a step, and the bytes of a file other than metrics.jsonl.
MOST = 2**53
MOST_BYTES = 256 * 2**20

Count = Annotated[int, Field(ge=0, le=MOST)]
Size = Annotated[int, Field(gt=0, le=MOST)]
Number = Annotated[float, Field(gt=-1e300, lt=1e300)]
Seconds = Annotated[float, Field(ge=0, lt=1e300)]
Speed = Annotated[float, Field(gt=0, lt=1e300)]
Model = TypeVar("Model", bound=BaseModel)


def _has_whole_numbers(identity: dict[str, Any]) -> dict[str, Any]:
    for key in ("train.seed", "facts.global_batch_size"):
        if identity.get(key) is not None and type(identity[key]) is not int:
            raise ValueError(f"{key} is not an integer")
    return identity


# It is flat, and reports compute with two of its values.
Identity = Annotated[dict[str, str | int | float | bool | list[Any] | None], AfterValidator(_has_whole_numbers)]


class Record(BaseModel):
    """What all files share: strict types, finite numbers, further keys as they are."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class RunRecord(Record):
    """run.json of this version's format."""

    steps: Count
    finished_at: Count | None
    wandb_id: Annotated[str, Field(min_length=1)]
    identity: Identity


class Plan(Record):
    """plan.json."""

    global_batch_size: Size
    items_per_epoch: Size | None = None
    steps: Count | None = None
    architecture: str | None = None
    text: list[str] | None = None
    not_loaded: dict[str, str] | None = None


class Problem(Record):
    """A file that is not used, in data_report.json."""

    name: str
    reason: str


class Cropped(Record):
    """An image that loses the fraction `lost` to the crop, in data_report.json."""

    name: str
    lost: Number


class ScanRecord(Record):
    """A scan of a folder in data_report.json. Older versions did not write what is None here."""

    problems: list[Problem]
    cropped: list[Cropped] | None = None
    notes: list[str] | None = None


class DataReport(ScanRecord):
    """data_report.json."""

    used: list[str]
    evaluation: ScanRecord | None = None
    prior_path: ScanRecord | None = None


class ValidationImage(Record):
    """An image in validation_set.json."""

    hash: str
    caption: str


class ValidationSetRecord(Record):
    """validation_set.json."""

    hash: str
    noise_samples: Size
    images: list[ValidationImage]


class Code(Record):
    """The code in an entry of provenance.json. Versions from before hashes were recorded have only the commit."""

    commit: str | None = None
    script: str | None = None
    hash: str | None = None
    files: dict[str, str] = {}
    named: dict[str, str] = {}


class Entry(Record):
    """An entry of provenance.json, one per launch."""

    step: Count | None = None
    world: Size | None = None
    device: str | None = None
    precision: str | None = None
    step_path: str | None = None
    random_scheme: int | None = None
    code: Code | None = None
    libraries: dict[str, str | None] | None = None
    base: dict[str, str | None] | None = None
    resolved_config: dict[str, Any] | None = None


class Line(Record):
    """A line of metrics.jsonl: a step, and numbers or null."""

    __pydantic_extra__: dict[str, Number | None]
    step: Count
    missing_from: Size = 1
    images_per_second: Speed = 1.0
    samples_seen: Seconds = 0.0
    # A step's device time is 0 if the clock is coarser than the step.
    gpu_seconds: Seconds = 0.0
    cpu_seconds: Seconds = 0.0


class ScoresSource(Record):
    """scores_source.json: what scores.json was made by (the experiment's command), and from which adapter of which step.

    `complete` is false until the command has ended well.
    """

    command: str
    adapter: str
    step: Count
    complete: bool


class File(Record):
    """A file of a checkpoint, in its manifest."""

    bytes: Count
    blake2b: str


class Facts(Record):
    """The facts in a checkpoint's manifest."""

    identity: Identity


class Manifest(Record):
    """manifest.json of a checkpoint."""

    format: int
    step: Count
    facts: Facts
    files: dict[str, File]
    blake2b: str


# provenance.json, and stage_timings.json: seconds by stage.
ENTRIES = TypeAdapter(list[Entry])
LINE = TypeAdapter(Line)
TIMINGS = TypeAdapter(dict[str, Seconds], config=ConfigDict(strict=True, allow_inf_nan=False))


def read_json(path: Path, remedy: str, most: int = MOST_BYTES) -> Any:
    """The JSON value in a file of at most `most` bytes.

    UserError if it cannot be read or is not JSON: what is wrong with the file, then `remedy`.
    """
    if not os.path.lexists(path):
        raise UserError(f"{path} is missing: {remedy}")
    try:
        return parse_json(read_regular(path, most), str(path), remedy, unique_keys=True)
    except UnreadableFile as error:
        raise UserError(f"{path} {error.reason}: {remedy}") from error


def read_as(path: Path, model: type[Record] | TypeAdapter, remedy: str) -> Any:
    """The content of a file, as JSON values, if `model` fits it. UserError as `read_json` if not."""
    return fitting(read_json(path, remedy), model, str(path), remedy)


def fitting(content: Any, model: type[Record] | TypeAdapter, where: str, remedy: str) -> Any:
    """`content` itself, if `model` fits it. UserError, which says where it is from, what is wrong and `remedy`, if not."""
    if problem := problem_of(content, model):
        raise UserError(f"{where} does not hold what a run writes ({problem}): {remedy}")
    return content


def problem_of(content: Any, model: type[Record] | TypeAdapter) -> str | None:
    """The first thing in `content` that `model` does not allow; None if it fits."""
    adapter = model if isinstance(model, TypeAdapter) else TypeAdapter(model)
    try:
        adapter.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
        if first["type"] in ("model_type", "dict_type"):
            said = "it should be a JSON object"
        elif first["type"] == "missing":
            return f"{place} is missing"
        return f"{place}: {said}" if place else said
    return None if _is_finite(content) else "it has a number that is not finite"


def _is_finite(content: Any) -> bool:
    """Whether strict JSON can hold the content."""
    try:
        json.dumps(content, allow_nan=False, default=str)
    except ValueError:
        return False
    return True


def read_config(path: Path, remedy: str) -> dict[str, Any]:
    """config.yaml, as a mapping of sections. UserError, which names the file, if it is not one that a run writes."""
    try:
        found = read_yaml(str(path))
    except UserError as error:
        raise UserError(f"{first_line(error)}; {remedy}") from error
    if not all(isinstance(found.get(section), dict) for section in ("lora", "train")):
        raise UserError(f"{path} does not hold what a run writes (sections are missing): {remedy}")
    if not _is_finite(found):
        raise UserError(f"{path} does not hold what a run writes (it has a number that is not finite): {remedy}")
    return found
