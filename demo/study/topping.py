"""Why losses follow the pictures of a topping less: two measurements on the adapters of the unagi setting.

    python -m demo.study.topping      # continues where it was interrupted; writes docs/examples/measure/topping.json

- Scores without guidance: pictures are drawn with classifier-free guidance, losses are of predictions without it.
- The loss in the area of the topping alone: the latents that differ when another topping is drawn in the same scene. It is the rest
  of the image, which is most of it, that a mean over the whole image is about.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demo.concepts import CONCEPTS
from demo.drawing import SQUARE, Jitter, draw
from demo.held_out import COUNT, SEED
from demo.measure import CONCEPT_PROMPTS, checker_of
from demo.painter import load_pipeline, paint
from demo.study.collect import Sets, copy_of, merge, open_sets
from demo.study.recipes import ROOT, SETTINGS, Setting
from demo.study.results import FOLDER, names
from sushi_research.evaluation import validation_set
from sushi_research.models import loading as base_loading
from sushi_research.training.run import quiet_libraries

SETTING = "unagi"
OTHER = "tuna"
PATH = FOLDER / "topping.json"


def main() -> None:
    """Measures each adapter that is not recorded yet."""
    quiet_libraries()
    setting = next(setting for setting in SETTINGS if setting.name == SETTING)
    found: dict[str, dict[str, Any]] = json.loads(PATH.read_text()) if PATH.exists() else {}
    for measure in (without_guidance, in_the_area):
        todo = {
            name: setting.folder / f"adapters/{name}.safetensors"
            for name in names(setting)
            if measure.__name__ not in found.get(name, {})
        }
        for name, value in measure(setting, todo) if todo else ():
            found.setdefault(name, {})[measure.__name__] = value
            PATH.parent.mkdir(parents=True, exist_ok=True)
            lines = [f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in found.items()]
            PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")
            print(name, value, flush=True)


def without_guidance(setting: Setting, adapters: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """How many of 32 pictures of the concept are right at a guidance of 1, which is none."""
    concept = CONCEPTS[setting.concept]
    checker, asked = checker_of(concept), concept.unseen_scenes(CONCEPT_PROMPTS)
    pipeline = load_pipeline(ROOT / f"demo/base/{setting.architecture}")
    weights = copy_of(pipeline.unet)
    for name, adapter in adapters.items():
        pipeline.unet.load_state_dict(weights)
        pipeline.load_lora_weights(str(adapter.parent), weight_name=adapter.name)
        merge(pipeline)
        images = paint(pipeline, [scene.caption for scene in asked], guidance=1.0, description=name)
        yield name, sum(checker.read(image).scene == scene for image, scene in zip(images, asked, strict=True))


def in_the_area(setting: Setting, adapters: dict[str, Path]) -> Iterator[tuple[str, list[float]]]:
    """log(loss / the base's loss) in the area of the topping, the mean over held-out images in each timestep bin."""
    sets = open_sets(setting)
    masks, bins = topping_masks(sets), sets.sets["held_out"].timesteps() // 250
    base = masked_loss(sets, masks)
    for name, adapter in adapters.items():
        sets.pipeline.unet.load_state_dict(sets.weights)
        merge(sets.pipeline, adapter)
        ratio = np.log(masked_loss(sets, masks) / base)
        yield name, [round(float(ratio[bins == number].mean()), 4) for number in range(4)]


@torch.no_grad()
def topping_masks(sets: Sets) -> list[torch.Tensor]:
    """For each held-out image, in the order of the validation set, the latent places [h, w] that another topping changes most."""
    vae = base_loading.load_vae(sets.base, torch.float32, sets.job.device)
    generator = np.random.default_rng([SEED, *SETTING.encode()])
    by_caption = {}
    for scene in CONCEPTS[SETTING].unseen_scenes(COUNT):
        jitter = Jitter.random(generator)
        pair = [draw(each, SQUARE, jitter=jitter) for each in (scene, replace(scene, topping=OTHER))]
        pixels = torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in pair])) / 127.5 - 1
        own, other = vae.encode(pixels.permute(0, 3, 1, 2)).latent_dist.mode()
        changed = (own - other).square().sum(0)
        by_caption[scene.caption] = changed > 0.1 * changed.max()
    return [by_caption[item.sample.caption] for item in sets.sets["held_out"].items]


def masked_loss(sets: Sets, masks: list[torch.Tensor]) -> np.ndarray:
    """The mean squared error within the masks, [N, noise samples]."""
    val_set, model = sets.sets["held_out"], sets.job.model
    caches = sets.inputs["held_out"].caches
    found = np.zeros((len(val_set.items), val_set.noise_samples))
    shown = validation_set.predictions(
        val_set.names,
        val_set.noise_samples,
        lambda index: validation_set.example(val_set, index, model, caches, caches.text),
        model,
        sets.pipeline.unet,
        sets.base.prediction,
        device=sets.job.device,
        rank=0,
        world=1,
        what="evaluating",
    )
    for index, part, predicted, goal in shown:
        found[index, part] = (predicted - goal).square().mean(1)[:, masks[index]].mean(1).numpy()
    return found


if __name__ == "__main__":
    sys.exit(main())
