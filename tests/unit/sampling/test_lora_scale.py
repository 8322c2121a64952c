"""A multiple of the LoRA scale, and back."""

import torch

from sushi_research.adapters import lora
from sushi_research.adapters.settings import AdapterSettings
from sushi_research.models import loading
from sushi_research.sampling.lora_scale import scaled


def test_a_factor_multiplies_what_the_adapter_adds_and_is_taken_back(bases):
    unet = loading.load_unet(loading.resolve_base(str(bases["sd15"])), torch.float32, torch.device("cpu")).eval()
    lora.attach(unet, AdapterSettings(targets=["attn2.to_k"], rank=2, alpha=3.0, dropout=0.0, init="default", seed=0))
    layers = lora.adapter_modules(unet)
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B[lora.ADAPTER].weight)
    name, layer = next(iter(layers.items()))
    hidden = torch.randn(1, 5, layer.in_features)
    base, full = layer.base_layer(hidden), layer(hidden)
    before = {name: dict(layer.scaling) for name, layer in layers.items()}
    with scaled(unet, -0.5):
        torch.testing.assert_close(layer(hidden), base - 0.5 * (full - base))
        with scaled(unet, 0.0):
            assert torch.equal(layer(hidden), base)
    assert {name: dict(layer.scaling) for name, layer in layers.items()} == before
    assert torch.equal(layer(hidden), full) and before[name] == {lora.ADAPTER: 1.5}
    with scaled(loading.load_unet(loading.resolve_base(str(bases["sd15"])), torch.float32, torch.device("cpu")), 0.5):
        pass  # a base has no such layers
