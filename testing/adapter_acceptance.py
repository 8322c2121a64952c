"""Which program loads which adapter file: the table in docs/formats.md, by loading every kind in every layout.

    make acceptance-files     # about two minutes; PYTHONPATH=tests python -m testing.adapter_acceptance --write docs/formats.md

The files are those of the suite's writers, with random numbers, for models with every module of the published ones, a few channels
wide. diffusers loads them itself; what ComfyUI, Forge, A1111 and InvokeAI do, a second reader computes (tests/other_readers.py). A
program loads a file if it uses every key and changes every layer as adapters/entries.py says, and no other.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import golden_names  # of the tests, as are these
import made_adapters
import narrow_models
import other_readers
import torch

from sushi_research.adapters import entries
from sushi_research.adapters.formats import writing
from sushi_research.adapters.portability import PROGRAMS, limits
from sushi_research.errors import UserError
from testing.result_pages import write_table

ROOT = Path(__file__).parents[1]
TABLE = "acceptance"
ARCHITECTURES = {"sd15": "SD1.5", "sdxl": "SDXL"}
LOADS = "loads"
INPUTS = (
    "sushi_research/adapters/entries.py",
    "sushi_research/adapters/formats/writing.py",
    "testing/adapter_acceptance.py",
    "tests/golden_names.py",
    "tests/made_adapters.py",
    "tests/narrow_models.py",
    "tests/other_readers.py",
)
LIBRARIES = ("diffusers", "peft", "transformers")
# A part of the layers for a quick test: every kind of layer, and enough keys for the rules that count them.
SOME = (
    *("conv_", "time_emb", "add_emb", "up_blocks.0.upsamplers.", "down_blocks.1.resnets.0.", "encoder.layers.7."),
    *("mid_block.attentions.0.proj", "mid_block.resnets.0.", "mid_block.attentions.0.transformer_blocks.0.attn2."),
    "mid_block.attentions.0.transformer_blocks.2.",
)
Layer = tuple[str, str]


@dataclass(frozen=True)
class Kind:
    """A row of the table: the kind of `made_adapters`, and which layers it has, as options of `golden_names.module_names`."""

    title: str
    kind: str
    conv: bool = True
    rest: bool = False
    text: bool = True
    # Endings of layers that the file does not have.
    without: tuple[str, ...] = ()
    norms: bool = False


KINDS = (
    Kind("LoRA of linear layers", "lora", conv=False),
    Kind("LoRA with convolutions", "lora"),
    Kind("LoRA with several ranks and scales", "lora mixed"),
    Kind("LoRA of every layer (OneTrainer's preset full)", "lora", rest=True),
    Kind(
        "LoRA of the UNet without attn2.to_k and to_v",
        "lora",
        conv=False,
        text=False,
        without=("attn2.to_k", "attn2.to_v"),
    ),
    Kind(
        "LoRA of convolutions alone",
        "lora",
        text=False,
        without=("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
    ),
    Kind("DoRA, magnitude of the inputs", "dora"),
    Kind("DoRA, magnitude of the outputs", "dora outputs"),
    Kind("DoRA of the UNet, magnitude of the outputs", "dora outputs", text=False),
    Kind("LoHa", "loha"),
    Kind("LoKr", "lokr"),
    Kind("LoKr of two whole matrices", "lokr whole"),
    Kind("LoRA, Tucker decomposition", "tucker"),
    Kind("LoHa, Tucker decomposition", "loha tucker"),
    Kind("LoKr, Tucker decomposition", "lokr tucker"),
    Kind("full differences, with norms", "full", text=False, norms=True),
)


@dataclass(frozen=True)
class File:
    """A kind in a layout for an architecture; with `some` only a part of its layers."""

    kind: Kind
    layout: writing.Layout
    architecture: str
    some: bool = False

    def layers(self) -> list[Layer]:
        """The layers that the file has."""
        kind = self.kind
        names = layers_by_name(self.architecture)
        found = [
            names[name]
            for name in golden_names.module_names(self.architecture, conv=kind.conv, rest=kind.rest, text=kind.text)
        ]
        if kind.norms:
            weights = narrow_models.weights(self.architecture)
            found += [layer for layer in weights if layer[0] == "unet" and weights[layer].dim() == 1]
        found = [layer for layer in found if not layer[1].endswith(kind.without)] if kind.without else found
        return [layer for layer in found if not self.some or layer[1].startswith(SOME)]

    def made(self, *, real: bool = False) -> dict[Layer, entries.Entry]:
        """What the file holds for each layer; `real`: of the published widths, without values."""
        weights = narrow_models.weights(self.architecture, real=real)
        return made_adapters.made(self.kind.kind, weights, self.layers())

    def tensors(self, *, real: bool = False) -> dict[str, torch.Tensor]:
        """The file's tensors as the suite writes them. UserError if the layout cannot hold the kind."""
        matches = in_components(self.made(real=real))
        dtype = torch.float32
        if real:  # the writer looks at the values
            stems = {
                c: writing.names_of(self.architecture, c, list(layers), self.layout) for c, layers in matches.items()
            }
            return {
                f"{stems[component][path]}.{part}": tensor
                for component, layers in matches.items()
                for path, entry in layers.items()
                for part, tensor in made_adapters.parts(entry).items()
            }
        return writing.tensors_of(self.architecture, matches, layout=self.layout, dtype=dtype)


@functools.cache
def layers_by_name(architecture: str) -> dict[str, Layer]:
    """Name of a module in kohya's files -> layer."""
    weights = narrow_models.weights(architecture)
    names = made_adapters.kohyas_names(architecture, weights)
    return {name: layer for layer, name in names.items()}


def in_components(made: dict[Layer, entries.Entry]) -> dict[str, dict[str, entries.Entry]]:
    """The entries as the suite has them: by component, with the paths of transformers 5."""
    matches: dict[str, dict[str, entries.Entry]] = {}
    for (component, path), entry in made.items():
        nested = component == "text_encoder_2" and path != "text_projection"
        matches.setdefault(component, {})[f"text_model.{path}" if nested else path] = entry
    return matches


def outcomes(file: File) -> Iterator[tuple[str, str]]:
    """(program, what it makes of the file) for every program."""
    made, tensors = file.made(), file.tensors()
    for program in PROGRAMS:
        if program == "diffusers":
            yield program, in_diffusers(file, made, tensors)
        else:
            yield program, in_second_reader(program, file, made, tensors)


def in_second_reader(
    program: str, file: File, made: dict[Layer, entries.Entry], tensors: dict[str, torch.Tensor]
) -> str:
    """What a program makes of the file by its published rules, in a few words."""
    weights = narrow_models.weights(file.architecture)
    loaded = other_readers.load(program, file.architecture, tensors, weights)
    if loaded.refused:
        return "refuses it"
    if len(loaded.weights) < len(made):
        return f"{len(loaded.weights):,} of {len(made):,} layers"
    assert loaded.weights.keys() == made.keys(), "a layer that the file does not have"
    biases = {layer: entry.bias for layer, entry in made.items() if isinstance(entry, entries.Difference)}
    assert all(torch.equal(loaded.biases[layer].float(), bias) for layer, bias in biases.items() if bias is not None)
    changes = {layer: entries.changed_weight(entry, weights[layer]) - weights[layer] for layer, entry in made.items()}
    if (words := words_for(changes, loaded.weights)) != LOADS:
        return words
    if loaded.unused:
        return f"leaves out {len(loaded.unused):,} keys"
    if program == "InvokeAI":
        base = other_readers.invoke_base(file.tensors(real=True))
        if base != file.architecture:
            return f"takes it for {ARCHITECTURES[base]}" if base else "cannot tell the base"
    return LOADS


def words_for(expected: dict[Layer, torch.Tensor], found: dict[Layer, torch.Tensor]) -> str:
    """ "loads" if every change is the expected one within the rounding of fp32."""
    worst = max(float((found[layer] - change).norm() / change.norm()) for layer, change in expected.items())
    return LOADS if worst < 1e-5 else "wrong weights"


def in_diffusers(file: File, made: dict[Layer, entries.Entry], tensors: dict[str, torch.Tensor]) -> str:
    """Loads the file as a user does, and compares every layer, every scale, and the outputs of UNet and text encoders."""
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import save_file

    pipeline, plain = _models(file.architecture)
    parts = {name: getattr(pipeline, name) for name in plain}
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
            save_file(tensors, Path(folder) / "adapter.safetensors")
            try:
                pipeline.load_lora_weights(folder, weight_name="adapter.safetensors", adapter_name="file")
            except ValueError:
                return "refuses it"
        modules = narrow_models.layers(parts)
        found = {layer: _change(module) for layer, module in modules.items() if isinstance(module, LoraLayer)}
        if len(found) < len(made):
            return f"{len(found):,} of {len(made):,} layers"
        assert found.keys() == made.keys(), "a layer that the file does not have"
        weights = narrow_models.weights(file.architecture)
        changes = {layer: entries.changed_weight(made[layer], weights[layer]) - weights[layer] for layer in made}
        if (words := words_for(changes, found)) != LOADS:
            return words
        _require_scales(modules, file, made)
        _require_outputs(_run(parts), plain, changes)
        return LOADS
    finally:
        pipeline.unload_lora_weights()


@functools.cache
def _models(architecture: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline that loads files, which each gives back as it was, and the same models without one."""
    plain = narrow_models.components(architecture, device="cpu")
    return _pipeline(architecture, copy.deepcopy(plain)), plain


@torch.no_grad()
def _require_outputs(found: dict[str, torch.Tensor], plain: dict[str, Any], changes: dict[Layer, torch.Tensor]) -> None:
    """The outputs are those of the models with changed weights."""
    modules = narrow_models.layers(plain)
    before = {layer: modules[layer].weight.clone() for layer in changes}
    try:
        for layer, change in changes.items():
            modules[layer].weight += change
        for name, output in _run(plain).items():
            error = float((found[name] - output).abs().max() / output.abs().max())
            assert error < 1e-3, f"the output of the {name} differs by {error:.2g}"
    finally:
        for layer, weight in before.items():
            modules[layer].weight.copy_(weight)


def _change(module: Any) -> torch.Tensor:
    """What a loaded layer adds to its weight, also with peft's DoRA."""
    weight = module.get_base_layer().weight.detach()
    change = module.get_delta_weight("file").detach()
    if "file" in module.lora_magnitude_vector:
        changed = weight + change
        magnitude = module.lora_magnitude_vector["file"].weight.detach()
        return (
            changed * magnitude.reshape(-1, *[1] * (weight.dim() - 1)) / entries.norms(changed, of_inputs=False)
            - weight
        )
    return change


def _require_scales(modules: dict[Layer, Any], file: File, made: dict[Layer, entries.Entry]) -> None:
    """The scale of every layer is alpha / rank, or 1 where the writer folds it into the matrices."""
    matches = in_components(made)
    keeps = {name: file.layout == "kohya" and writing.has_one_scale(layers) for name, layers in matches.items()}
    for (component, path), entry in made.items():
        scale = entry.scale if keeps[component] else 1.0
        assert abs(modules[component, path].scaling["file"] - scale) < 1e-6, f"the scale of {path}"


def _pipeline(architecture: str, parts: dict[str, Any]) -> Any:
    import diffusers

    diffusers.utils.logging.set_verbosity(50)
    none = {"vae": None, "tokenizer": None, "scheduler": None}
    if architecture == "sdxl":
        return diffusers.StableDiffusionXLPipeline(**parts, **none, tokenizer_2=None)
    return diffusers.StableDiffusionPipeline(
        **parts, **none, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


@torch.no_grad()
def _run(parts: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The outputs of UNet and text encoders for fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 500, (1, 77), generator=generator)
    unet = parts["unet"]
    config, extra = unet.config, {}
    if config.addition_embed_type:
        extra = {"text_embeds": torch.randn(1, 16, generator=generator), "time_ids": torch.ones(1, 6)}
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    states = torch.randn(1, 77, config.cross_attention_dim, generator=generator)
    found = {"unet": unet(latents, torch.tensor(300), states, added_cond_kwargs=extra or None).sample}
    for name in parts.keys() - {"unet"}:
        found[name] = parts[name](tokens).last_hidden_state
    return found


def files(*, some: bool = False) -> list[File]:
    """Every kind in every layout that holds it, for every architecture."""
    found = []
    for kind in KINDS:
        for layout in writing.LAYOUTS:
            is_low_rank = kind.kind in ("lora", "lora mixed", "tucker", "dora outputs")
            if layout == "kohya" or is_low_rank:
                found += [File(kind, layout, architecture, some) for architecture in ARCHITECTURES]
    return found


def table(rows: Iterable[tuple[File, dict[str, str]]]) -> list[str]:
    """The lines of the Markdown table; one row for both architectures where they are equal."""
    by_kind: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for file, found in rows:
        by_kind.setdefault((file.kind.title, file.layout), {})[file.architecture] = found
    lines = [f"| kind | layout | base | {' | '.join(PROGRAMS)} |", "|---|---|---|" + "---|" * len(PROGRAMS)]
    for (title, layout), found in by_kind.items():
        groups = (
            [("both", found["sd15"])]
            if found["sd15"] == found["sdxl"]
            else [(ARCHITECTURES[a], found[a]) for a in found]
        )
        lines += [
            f"| {title} | {layout} | {base} | {' | '.join(cells[each] for each in PROGRAMS)} |"
            for base, cells in groups
        ]
    return lines


def inputs_hash() -> str:
    """SHA-256 of the code that decides the table."""
    digest = hashlib.sha256()
    for name in INPUTS:
        digest.update(hashlib.sha256((ROOT / name).read_bytes()).digest())
    return digest.hexdigest()


def main(arguments: Sequence[str] | None = None) -> None:
    """Loads every file and prints the table, or writes it to the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="the page with the table")
    page = parser.parse_args(arguments).write
    start, rows = time.monotonic(), []
    for file in files():
        found = dict(outcomes(file))
        said = limits(file.architecture, in_components(file.made()), layout=file.layout)
        different = [program for program in PROGRAMS if (found[program] == LOADS) == (program in said)]
        print(f"{file.kind.title}, {file.layout}, {ARCHITECTURES[file.architecture]}: {found}", flush=True)
        if different:
            raise UserError(f"adapters/portability.py says otherwise of {', '.join(different)}: {said}.")
        rows.append((file, found))
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    note = f"{versions}, {time.strftime('%Y-%m-%d', time.gmtime())}. SHA-256 of the inputs: `{inputs_hash()}`."
    print(f"{len(rows)} files in {time.monotonic() - start:.0f} s")
    if page:
        write_table(page, TABLE, "\n".join([*table(rows), "", note]))


if __name__ == "__main__":
    main()
