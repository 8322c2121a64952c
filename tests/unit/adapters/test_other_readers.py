"""What other programs make of adapter files: the rules in tests/other_readers.py give what is known of them, and our formulas."""

from __future__ import annotations

import functools
import re

import made_adapters
import narrow_models
import other_readers
import pytest
import torch
from golden_names import module_names

from sushi_research.adapters import entries, targets
from sushi_research.adapters.kohya_format import kohya_unet_names

ARCHITECTURES = ("sd15", "sdxl")


@functools.cache
def layers_by_name(architecture):
    """Name in kohya's files -> layer of the narrow model."""
    weights = narrow_models.weights(architecture)
    return {name: layer for layer, name in made_adapters.kohyas_names(architecture, weights).items()}


def kohyas(architecture, **parts):
    return [layers_by_name(architecture)[name] for name in module_names(architecture, **parts)]


@pytest.mark.parametrize(("architecture", "counts"), [("sd15", (264, 350, 282)), ("sdxl", (986, 1052, 794))])
def test_golden_names_are_those_of_the_models(architecture, counts):
    """The lists, written by hand, name each layer of the published structure once."""
    lists = [{}, {"conv": True}, {"conv": True, "rest": True, "text": False}]
    assert tuple(len(set(kohyas(architecture, **parts))) for parts in lists) == counts
    linear = {
        (component, path)
        for (component, path), module in narrow_models.layers(narrow_models.components(architecture)).items()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and path != "text_projection"
    }
    assert set(kohyas(architecture, conv=True, rest=True)) == linear


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_our_names_are_the_golden_ones(architecture):
    unet = narrow_models.components(architecture)["unet"]
    for preset, conv in (("kohya", False), ("kohya_conv", True)):
        paths = targets.matching(targets.resolve_targets(preset), targets.adaptable_paths(unet))
        names = kohya_unet_names(architecture, sorted(paths)).values()
        assert sorted(names) == sorted(module_names(architecture, conv=conv, text=False))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", made_adapters.KINDS)
def test_every_program_makes_of_an_entry_what_we_do(architecture, kind):
    """All keys are used, no other layer changes, and every change is that of entries.py."""
    weights = narrow_models.weights(architecture)
    layers = kohyas(architecture, conv=True, rest=True)
    # One in nine of the layers; whole attentions of the second encoder, which A1111 changes only as a whole.
    chosen = layers[::9] + [layer for layer in layers if layer[0] == "text_encoder_2" and ".layers.7." in layer[1]]
    chosen = [layer for layer in chosen if layer[0] != "text_encoder_2" or ".layers.7." in layer[1]]
    made = made_adapters.made(kind, weights, chosen)
    tensors = made_adapters.in_kohyas_names(architecture, made)
    for program in other_readers.PROGRAMS:
        loaded = other_readers.load(program, architecture, tensors, weights)
        expected = set(made)
        if kind == "lokr tucker" and program == "Forge":
            assert loaded.refused
            continue
        if kind == "lokr tucker" and program == "ComfyUI":
            expected = {layer for layer in made if made[layer].t2 is None}
        assert (loaded.refused, loaded.unused, loaded.weights.keys()) == ("", set(), expected), program
        for layer in expected:
            ours = entries.changed_weight(made[layer], weights[layer]) - weights[layer]
            assert_near(loaded.weights[layer], ours, f"{program} {layer}")
        if kind == "full":
            biases = {layer: entry.bias for layer, entry in made.items() if entry.bias is not None}
            assert loaded.biases.keys() == biases.keys()
            assert all(torch.equal(loaded.biases[layer], bias.double()) for layer, bias in biases.items())


def assert_near(found, expected, what):
    """Within the rounding of fp32 sums, of the largest value."""
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f"{what}: {error}"


def renamed(tensors, *changes):
    for pattern, new in changes:
        tensors = {re.sub(pattern, new, key): value for key, value in tensors.items()}
    return tensors


def in_pefts_names(made, text="text_model."):
    tensors = {}
    for (component, path), entry in made.items():
        name = f"{component}.{text if component != 'unet' else ''}{path}"
        tensors |= {f"{name}.lora_A.weight": entry.down, f"{name}.lora_B.weight": entry.up}
    return tensors


# Naming of a file of kohya's modules (with convolutions) -> program -> how many of SD1.5's 350 and SDXL's 1,052 it loads; None: it
# refuses the file. Measured with the programs' own code (2026-09, ComfyUI 0.3.64, A1111 1.9.4, InvokeAI 6.14).
MEASURED = {
    "ours": {"ComfyUI": (350, 1052), "Forge": (350, 1052), "A1111": (350, 1052), "InvokeAI": (350, 1052)},
    "Stability's": {"ComfyUI": (350, 1052), "Forge": (350, 1052), "A1111": (350, 1052), "InvokeAI": (72, 1052)},
    "diffusers'": {"ComfyUI": (350, 1052), "Forge": (350, 1052), "A1111": (350, 1051), "InvokeAI": (350, 1052)},
    # ComfyUI knows attention in this spelling only with `.processor.` in it: 128 and 560 modules are lost.
    "peft": {"ComfyUI": (222, 492), "Forge": (None, None), "A1111": (0, 0), "InvokeAI": (None, None)},
    "without text_model": {"ComfyUI": (278, 980), "Forge": (None, None), "A1111": (278, 980), "InvokeAI": (278, 980)},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("naming", MEASURED)
def test_known_losses_are_reproduced(architecture, naming):
    weights = narrow_models.weights(architecture)
    made = made_adapters.made("lora", weights, kohyas(architecture, conv=True))
    if naming == "peft":
        tensors = in_pefts_names(made)
    elif naming == "without text_model":
        # transformers 5 has no such child in CLIPTextModel.
        tensors = renamed(made_adapters.in_kohyas_names(architecture, made), (r"^(lora_te1?_)text_model_", r"\1"))
    else:
        stability = {"ours": None, "Stability's": True, "diffusers'": False}[naming]
        tensors = made_adapters.in_kohyas_names(architecture, made, stability=stability)
    for program, counts in MEASURED[naming].items():
        loaded = other_readers.load(program, architecture, tensors, weights)
        count = None if loaded.refused else len(loaded.weights)
        assert count == counts[ARCHITECTURES.index(architecture)], program
        assert bool(loaded.unused) == (count != len(made)), program


def test_a_magnitude_of_the_outputs_is_wrong_everywhere():
    """peft's axis, and the default of LyCORIS: why we write that of the inputs."""
    weights = narrow_models.weights("sd15")
    layer = ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2")
    [entry] = made_adapters.made("dora", weights, [layer]).values()
    norms = entries.norms(weights[layer] + entries.delta(entry, weights[layer].shape), of_inputs=False)
    entry = entries.LowRank("", entry.down, entry.up, entry.scale, magnitude=1.1 * norms)
    ours = entries.changed_weight(entry, weights[layer]) - weights[layer]
    for program in other_readers.PROGRAMS:
        tensors = made_adapters.in_kohyas_names("sd15", {layer: entry})
        change = other_readers.load(program, "sd15", tensors, weights).weights[layer]
        assert (change - ours).norm() / ours.norm() > 0.1, program
