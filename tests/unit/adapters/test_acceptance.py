"""Adapters of every kind that is trained, and files in every naming: the file, our reader and other programs agree."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import narrow_models
import other_readers
import pytest
import torch
from golden_names import ENDS, module_names
from safetensors.torch import load_file, save_file

from sushi_research.adapters import kohya_format, lora, portability
from sushi_research.adapters.entries import changed_weight
from sushi_research.adapters.matching import match_components
from sushi_research.adapters.module_names import locate
from sushi_research.adapters.reading import read_adapter
from sushi_research.adapters.settings import AdapterSettings
from sushi_research.models import ARCHITECTURES
from testing import adapter_acceptance as acceptance

KINDS = ("lora", "dora", "loha", "lokr")
SETTINGS = AdapterSettings(targets="kohya_conv", rank=2, alpha=1.0)
TEXT = [*(f"{part}_proj" for part in ("q", "k", "v", "out")), "fc1", "fc2"]


@functools.cache
def trained(architecture, kind):
    """Narrow components with a trained adapter of this kind on all layers of kohya's preset, and its tensors by name."""
    components = narrow_models.components(architecture, device="cpu")
    for name, component in components.items():
        own = SETTINGS if name == "unet" else replace(SETTINGS, targets=TEXT)
        lora.attach(component, replace(own, kind=kind), name=name)
    generator = torch.Generator().manual_seed(0)
    parameters = lora.adapter_parameters(components)
    state = {name: torch.randn(each.shape, generator=generator) / 4 for name, each in parameters.items()}
    return components, state


# SDXL's 1,052 layers take seconds; what is written for its kinds is in test_portability.py too.
@pytest.mark.parametrize(
    ("architecture", "kind"), [*(("sd15", kind) for kind in KINDS), ("sdxl", "lora"), ("sdxl", "lokr")]
)
def test_a_trained_adapter_is_the_same_in_every_program(architecture, kind, tmp_path):
    components, state = trained(architecture, kind)
    path = tmp_path / "adapter.safetensors"
    kohya_format.save_adapter(
        path, components, architecture=architecture, state=state, dtype=torch.float32, metadata={"ss_v2": "False"}
    )
    tensors = load_file(path)
    names = module_names(architecture, conv=True)
    assert {key.partition(".")[0] for key in tensors} == set(names)
    if kind in ENDS:
        assert tensors.keys() == {f"{name}.{end}" for name in names for end in ENDS[kind]}

    entries = lora.trained_entries(components, state)
    # The values of a part of the layers.
    weights = narrow_models.weights(architecture)
    chosen = {
        (component, layer.removeprefix("text_model.")): entry
        for component, layers in entries.items()
        for layer, entry in layers.items()
        if layer.removeprefix("text_model.").startswith(acceptance.SOME)
    }
    changes = {layer: changed_weight(entry, weights[layer]) - weights[layer] for layer, entry in chosen.items()}
    assert len(changes) > 15
    some = {key: each for key, each in tensors.items() if layer_of(architecture, key) in changes}
    limits = portability.limits(architecture, entries)
    for program in other_readers.PROGRAMS:
        loaded = other_readers.load(program, architecture, some, weights)
        assert (loaded.refused, loaded.unused) == ("", set()) and loaded.weights.keys() == changes.keys(), program
        assert acceptance.words_for(changes, loaded.weights) == acceptance.LOADS, program
        assert program not in limits or (program, architecture, kind) == ("InvokeAI", "sd15", "lokr")
    assert ("diffusers" in limits) == (kind != "lora")  # test_portability.py loads them there
    save_file(some, path)
    assert_ours(path, architecture, changes)


def layer_of(architecture, key):
    return acceptance.layers_by_name(architecture)[key.partition(".")[0]]


@functools.cache
def empty(architecture):
    return narrow_models.components(architecture)


def assert_ours(path, architecture, changes):
    """Our reader finds these changes of the narrow model's layers, and no others."""
    found = match_components(read_adapter(path), ARCHITECTURES[architecture], empty(architecture))
    weights = narrow_models.weights(architecture)
    ours = {
        (component, path.removeprefix("text_model.")): entry
        for component, layers in found.items()
        for path, entry in layers.items()
    }
    assert ours.keys() == changes.keys()
    ours = {layer: changed_weight(entry, weights[layer]) - weights[layer] for layer, entry in ours.items()}
    assert acceptance.words_for(changes, ours) == acceptance.LOADS


FILES = [file for file in acceptance.files(some=True) if file.layout == "kohya" or file.architecture == "sd15"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.kind.title}-{file.layout}-{file.architecture}")
def test_our_reader_agrees_on_every_kind_and_naming(file, tmp_path):
    made, weights = file.made(), narrow_models.weights(file.architecture)
    changes = {layer: changed_weight(entry, weights[layer]) - weights[layer] for layer, entry in made.items()}
    tensors = file.tensors()
    namings = {"as written": tensors}
    if file.layout == "kohya":
        flat = {layer: name for name, layer in acceptance.layers_by_name(file.architecture).items()}
        diffusers = {flat[layer]: "lora_unet_" + layer[1].replace(".", "_") for layer in made if layer[0] == "unet"}
        namings["diffusers' blocks"] = renamed(tensors, diffusers)
    for naming, stored in namings.items():
        save_file(stored, tmp_path / "adapter.safetensors")
        assert_ours(tmp_path / "adapter.safetensors", file.architecture, changes), naming


def renamed(tensors, names):
    """The tensors with other names of their modules."""
    return {re.sub(r"^[^.]+", lambda match: names.get(match[0], match[0]), key): each for key, each in tensors.items()}


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_a_file_of_the_published_sizes_is_located_and_known_to_invoke(architecture, tmp_path):
    """The golden key lists at the widths of the published models, with text encoders."""
    names = acceptance.layers_by_name(architecture)
    real = narrow_models.weights(architecture, real=True)
    tensors = {}
    for name in module_names(architecture, conv=True, rest=True):
        out, into, *kernel = real[names[name]].shape
        tensors[f"{name}.lora_down.weight"] = torch.zeros(1, into, *kernel, dtype=torch.float16)
        tensors[f"{name}.lora_up.weight"] = torch.zeros(out, 1, *[1] * len(kernel), dtype=torch.float16)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "adapter.safetensors")
    found, matches = locate(read_adapter(tmp_path / "adapter.safetensors"))
    assert found.name == architecture
    assert {component: len(layers) for component, layers in matches.items()} == (
        {"unet": 282, "text_encoder": 72}
        if architecture == "sd15"
        else {"unet": 794, "text_encoder": 72, "text_encoder_2": 192}
    )
    assert other_readers.invoke_base(tensors) == architecture
