"""Describes a base in a file or folder: the output of `scripts/inspect_model.py`. Weights are read only to hash them.

At its end it refuses what training would refuse as `model.base`, with the same sentence.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from sushi_research.config.suggestions import setting
from sushi_research.errors import UserError, first_line
from sushi_research.models import ARCHITECTURES, loading, prediction, sources
from sushi_research.models.components import TITLES
from sushi_research.models.diffusers_folder import WEIGHTS, FolderPart
from sushi_research.models.formats import number
from sushi_research.models.header import Header, Tensor, read_header
from sushi_research.models.single_file import SingleFile
from sushi_research.progress import progress

# Number of keys of one kind that are listed.
SHOWN = 8

# (title, text).
Line = tuple[str, str]
# The title of the command to train on the base. It is printed as it is, because a line break would split it.
COMMAND = "train on it"


def describe(path: Path, source: str) -> Iterator[Line]:
    """The lines about a `.safetensors` file or a folder in diffusers format, fast ones first.

    `source` is the model as the user named it. A file that cannot be a base by itself is described too. UserError, after the
    lines, if `path` cannot be used as `model.base` without further options.
    """
    if path.is_dir():
        yield from _describe_folder(path, source)
    else:
        yield from _describe_file(read_header(path), source)


def _describe_file(header: Header, source: str) -> Iterator[Line]:
    count = len(header.tensors)
    size = header.path.stat().st_size
    shown = f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
    yield "file", f"{header.path.name}, {shown}, {count:,} tensors"
    refusal = None
    try:
        opened = sources.open_file(header)
    except UserError as error:
        refusal = error
        yield "it is", str(refusal).removeprefix(f"{header.path} is ")
        yield "weights", _weights(header.tensors.values())
    else:
        yield "it is", f"{ARCHITECTURES[opened.architecture].title} base"
        yield "predicts", _prediction(opened.evidence).replace(f" in {header.path}", "")
        yield from _components(opened.single)
        try:
            prediction.decide(opened.evidence)
            loading.complete_parts(opened, {}, str(header.path))
            yield COMMAND, _command(opened.architecture, source)
        except UserError as error:
            refusal = error
    yield "sha256", _sha256(header.path)
    if refusal:
        raise refusal


def _components(single: SingleFile) -> Iterator[Line]:
    parts, missing = {}, []
    for name, title in TITLES.items():
        if name in single:
            # The UNet's shapes do not show the width of the pooled embedding; the second text encoder's do.
            second = parts.get("text_encoder_2") or ("text_encoder_2" in single and single.part("text_encoder_2"))
            try:
                part = single.part(name, number(second.config, "projection_dim", 512) if second else None)
                text = _weights(part.tensors.values())
                parts[name] = part
            except UserError as error:
                text = str(error)
            yield title, text
        elif name in ARCHITECTURES[single.architecture].formats().TEXT_ENCODERS or name == "vae":
            option = "--model.vae" if name == "vae" else "--model.text_encoders"
            missing.append(f"{title} (give {option})")
    yield "missing", ", ".join(missing) or "nothing"
    ignored, unknown = single.leftovers(parts.values())
    for reason in dict.fromkeys(ignored.values()):
        yield "not used", f"{_some([key for key in ignored if ignored[key] == reason])}: {reason}"
    yield "unknown", f"{_some(unknown)}: this suite does not know such a model" if unknown else "nothing"


def _describe_folder(folder: Path, source: str) -> Iterator[Line]:
    yield "folder", str(folder)
    variant = sources.only_half(folder / "unet", WEIGHTS["unet"])
    opened = sources.open_folder(folder, variant, prediction_type="epsilon")
    yield "it is", f"{ARCHITECTURES[opened.architecture].title} base in diffusers format"
    yield "predicts", _prediction(opened.evidence) if opened.evidence else "unknown (no scheduler_config.json)"
    refusal, missing = None, []
    try:
        # As training does; of a hub id this fetches the weights.
        loading.resolve_base(source, variant=variant).require_loadable()
    except UserError as error:
        refusal = error
    for name in ("unet", "vae", *ARCHITECTURES[opened.architecture].formats().TEXT_ENCODERS):
        try:
            yield TITLES[name], _files(opened.part(name, {}))
        except UserError as error:
            missing.append(str(error))
    yield "missing", " ".join(missing) or "nothing"
    if refusal:
        raise refusal
    yield COMMAND, _command(opened.architecture, source, variant)


def _command(architecture: str, source: str, variant: str | None = None) -> str:
    options = [setting("model.base", source), *([setting("model.variant", variant)] if variant else [])]
    script = f"accelerate launch {ARCHITECTURES[architecture].script} --config configs/{architecture}_lora.yaml"
    return f"{script} {' '.join(options)} --data.path photos"


def _files(part: sources.Part) -> str:
    assert isinstance(part, FolderPart)
    tensors = [tensor for file in part.files for tensor in read_header(file).tensors.values()]
    return f"{_weights(tensors)}; sha256 {', '.join(_sha256(file)[:12] for file in part.files)}"


def _prediction(evidence: list[prediction.Evidence]) -> str:
    try:
        found = prediction.decide(evidence)
    except UserError as error:
        return str(error)
    where = [said.where for said in evidence if said.type or said.zero_terminal_snr]
    return f"{found.describe()} ({', '.join(where) or 'nothing in the file says otherwise'})"


def _weights(tensors: Iterable[Tensor]) -> str:
    """Number of tensors and values, and the number of tensors of each dtype."""
    tensors = list(tensors)
    values = sum(math.prod(tensor.shape) for tensor in tensors)
    dtypes = Counter(tensor.dtype for tensor in tensors)
    shown = ", ".join(dtype if len(dtypes) == 1 else f"{dtype} ({count})" for dtype, count in dtypes.most_common())
    return f"{len(tensors):,} tensors, {values:,} values, {shown or 'none'}"


def _some(keys: list[str]) -> str:
    shown = ", ".join(ascii(key)[1:-1][:100] for key in sorted(keys)[:SHOWN])
    return shown if len(keys) <= SHOWN else f"{shown} and {len(keys) - SHOWN:,} more"


def _sha256(path: Path) -> str:
    """The hash that Civitai and A1111 use: its first ten digits are their "AutoV2"."""
    digest = hashlib.sha256()
    bar = progress(total=path.stat().st_size, description="hashing", unit="B", scale=True, leave=False)
    try:
        with open(path, "rb") as file, bar:
            while piece := file.read(1 << 22):
                digest.update(piece)
                bar.update(len(piece))
    except OSError as error:
        raise UserError(
            f"{path} could not be read ({first_line(error)}): check the disk and the permissions."
        ) from error
    return digest.hexdigest()
