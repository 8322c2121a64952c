"""Scores and measures the adapters of one setting of the study, one file of numbers for each.

python -m demo.study.collect star      # continues where it was interrupted

The scores (`demo.measure`: of 32 pictures of the concept and 32 of the base's world, those that are right) are the truth of the
study. What is measured is what the product measures, by its own functions; images, prompts and noise are others than those of the
scores.
"""

from __future__ import annotations

import io
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demo.concepts import CONCEPTS, PHOTOS, known_scenes
from demo.held_out import FOLDER as HELD_OUT
from demo.measure import CONCEPT_PROMPTS, KNOWN_PROMPTS, checker_of
from demo.painter import load_pipeline, paint
from demo.study.recipes import ROOT, SETTINGS, Setting, photos
from demo.study.train import config_of, load_script
from sushi_research.adapters import loading
from sushi_research.adapters.entries import changed_weight
from sushi_research.caches.caches import open_caches, open_hash_cache, open_remembered
from sushi_research.caches.inputs import Inputs, fill_caches
from sushi_research.data.training_data import read_data
from sushi_research.evaluation import validation_set
from sushi_research.files import write_atomic, write_json
from sushi_research.models.loading import find_base
from sushi_research.sampling import pipeline, plots
from sushi_research.training import evaluating, identity_facts
from sushi_research.training.run import quiet_libraries, start_job

# Prompts of the pictures that are measured, and the scenes of the neutral ones (`demo.concepts.known_scenes`).
PICTURES, NEUTRAL, NEUTRAL_FROM = 16, 16, 40
NOISE_SAMPLES = 8
# As many as those of the drift images. The scores are of pictures with 20 steps and other noise.
STEPS = 12


def score_adapters(setting: Setting, adapters: dict[str, Path | None]) -> None:
    """Writes scores/NAME.json and the pictures that were scored, for each adapter (None: the base)."""
    concept, base = CONCEPTS[setting.concept], ROOT / f"demo/base/{setting.architecture}"
    checker = checker_of(concept)
    asked, known = concept.unseen_scenes(CONCEPT_PROMPTS), known_scenes(KNOWN_PROMPTS)
    scenes = [*asked, *known]
    painter = None
    for name, adapter in adapters.items():
        path = setting.folder / "scores" / f"{name}.json"
        if path.exists():
            continue
        started = time.monotonic()
        if painter is None:
            painter = load_pipeline(base)
            weights = copy_of(painter.unet)
        painter.unet.load_state_dict(weights)
        if adapter is not None:
            painter.load_lora_weights(str(adapter.parent), weight_name=adapter.name)
            merge(painter)
        images = paint(painter, [scene.caption for scene in asked], description=name)
        images += paint(painter, [scene.caption for scene in known], description=name)
        readings = [checker.read(image) for image in images]
        right = [reading.scene == scene for reading, scene in zip(readings, scenes, strict=True)]
        nearest = [reading.nearest == scene for reading, scene in zip(readings, scenes, strict=True)]
        path.parent.mkdir(parents=True, exist_ok=True)
        cells = [images[first : first + 8] for first in range(0, len(images), 8)]
        plots.grid(cells, [""] * len(cells), [""] * 8).save(path.with_suffix(".png"))
        write_json(
            path,
            {
                "concept": right[: len(asked)],
                "kept": right[len(asked) :],
                "concept_nearest": nearest[: len(asked)],
                "kept_nearest": nearest[len(asked) :],
                "pieces": [round(reading.pieces, 4) for reading in readings],
                "dish": [round(reading.dish, 4) for reading in readings],
                "sharpness": [round(reading.sharpness, 3) for reading in readings],
            },
        )
        print(
            name, sum(right[: len(asked)]), sum(right[len(asked) :]), f"{time.monotonic() - started:.0f} s", flush=True
        )


def measure_adapters(setting: Setting, adapters: dict[str, Path | None]) -> None:
    """Writes measures/NAME.npz for each adapter: losses on each set of images, drift, and the latents of the pictures."""
    todo = {name: path for name, path in adapters.items() if not measures_path(setting, name).exists()}
    if not todo:
        return
    sets = open_sets(setting)
    base_arrays: dict[str, np.ndarray] = {}
    for name, adapter in [("base", None), *((name, path) for name, path in todo.items() if path is not None)]:
        if adapter is not None and measures_path(setting, name).exists():
            continue
        started = time.monotonic()
        sets.pipeline.unet.load_state_dict(sets.weights)
        if adapter is not None:
            merge(sets.pipeline, adapter)
        found = sets.measure()
        if adapter is None:
            base_arrays = {key: value for key, value in found.items() if key.startswith("loss/")}
        data = io.BytesIO()
        np.savez_compressed(data, **found, **{f"base_{key}": value for key, value in base_arrays.items()})
        path = measures_path(setting, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data.getvalue())
        print(name, f"{time.monotonic() - started:.0f} s", flush=True)


def copy_of(unet: Any) -> dict[str, torch.Tensor]:
    """The weights of a UNet, to restore them after `merge`."""
    return {name: tensor.clone() for name, tensor in unet.state_dict().items()}


@torch.no_grad()
def merge(pipe: Any, adapter: Path) -> None:
    """Adds what the adapter file changes to the UNet's weights, which halves the time of what follows."""
    for where, entry in loading.matches_of(pipe, adapter)["unet"].items():
        layer = pipe.unet.get_submodule(where)
        layer.weight.copy_(changed_weight(entry, layer.weight))


def measures_path(setting: Setting, name: str) -> Path:
    """Where the measured arrays of an adapter are kept."""
    return setting.folder / "measures" / f"{name}.npz"


class Sets:
    """The base with its images: held-out ones and training photos of the concept, prior images that nothing is trained on, and what
    the base itself generates from neutral prompts."""

    def __init__(self, job: Any, inputs: dict[str, Inputs], sets: dict[str, Any], base: Any) -> None:
        self.job, self.inputs, self.sets, self.base = job, inputs, sets, base
        any_inputs = inputs["held_out"]
        text = job.model.load_text(base, job.device)
        self.pipeline = loading.load_pipeline(base, job.model, text, job.compute_dtype, job.device)
        self.captions = [item.sample.caption for item in sets["held_out"].items][:PICTURES]
        self.neutral = neutral_captions()
        base_hash = identity_facts.hashes_of(job, any_inputs)["base_model"]["unet"]
        self.drift = evaluating.open_drift(job, any_inputs, base_hash, self.pipeline.unet)
        self.drift.drift_set = replace(self.drift.drift_set, noise_samples=NOISE_SAMPLES)
        self.drift.remember_base(self.pipeline.unet)
        self.weights = copy_of(self.pipeline.unet)

    def measure(self) -> dict[str, np.ndarray]:
        """The arrays of the pipeline's UNet as it is."""
        job, unet = self.job, self.pipeline.unet
        found = {}
        for name, val_set in self.sets.items():
            caches = self.inputs[name].caches
            found[f"loss/{name}"] = validation_set.losses(
                val_set, job.model, unet, caches, self.base.prediction, device=job.device
            )
            found[f"times/{name}"] = val_set.timesteps()
        moved, own = self.drift.measure(unet)
        found |= {"loss/own": own, "times/own": self.drift.drift_set.timesteps(), "drift": moved}
        text, config = self.inputs["held_out"].caches.text, job.config
        negative = pipeline.unconditional(text(""), self.base.force_zeros)
        for kind, prompts in {"concept": self.captions, "neutral": self.neutral}.items():
            latents = pipeline.generate_latents(
                job.model,
                self.base,
                unet,
                [text(prompt) for prompt in prompts],
                negative,
                seeds=[0],
                steps=STEPS,
                guidance=config.sample.guidance,
                height=config.data.resolution,
                width=config.data.resolution,
            )
            found[f"pictures/{kind}"] = torch.cat(list(latents)).half().cpu().numpy()
        references = [
            validation_set.example(self.sets["held_out"], index, job.model, self.inputs["held_out"].caches, text)
            for index in range(PICTURES)
        ]
        found["reference"] = torch.stack([example.latents for example in references]).half().numpy()
        return found


def open_sets(setting: Setting) -> Sets:
    """The base and every set of images of a setting."""
    script = load_script(setting.architecture)

    def open_job(source: Path) -> tuple[Any, Inputs]:
        settings = {
            "evaluation.path": str(source),
            # Not measured; the photos of the concept itself may be the ones in `source`.
            "data.path": str(PHOTOS / ("night" if setting.concept == "star" else "star")),
            "evaluation.drift_captions": neutral_captions(),
            "evaluation.noise_samples": NOISE_SAMPLES,
            "cache.folder": str(setting.folder / "measure-cache"),
            "sample.prompts": ["one tuna nigiri on a blue plate"],
            "tracking.wandb": "off",
            "dry_run": True,
        }
        config = config_of(script, setting, settings)
        job = start_job(config, script.model, script.__file__)
        hash_cache = open_hash_cache(config)
        base = find_base(config, job.model)
        data = read_data(job, open_remembered(config))
        inputs = Inputs(config, base, data, open_caches(job, base, hash_cache), hash_cache)
        fill_caches(job, inputs)
        return job, inputs

    opened = {
        "held_out": open_job(HELD_OUT / setting.concept),
        "prior": open_job(HELD_OUT / "prior"),
        "photos": open_job(photos(setting, "no-prior")),
    }
    sets = {}
    for name, (job, inputs) in opened.items():
        base_hash = identity_facts.hashes_of(job, inputs)["base_model"]["unet"]
        sets[name] = identity_facts.validation_set_of(job, inputs, base_hash)
    job, inputs = opened["held_out"]
    return Sets(job, {name: inputs for name, (_, inputs) in opened.items()}, sets, inputs.base)


def neutral_captions() -> list[str]:
    """Captions of the base's own world that are neither scored nor trained on."""
    return [scene.caption for scene in known_scenes(NEUTRAL, start=NEUTRAL_FROM)]


def main(name: str) -> None:
    """Scores and measures every adapter of a setting that exists."""
    quiet_libraries()
    setting = next(setting for setting in SETTINGS if setting.name == name)
    adapters: dict[str, Path | None] = {"base": None}
    adapters |= {path.stem: path for path in sorted((setting.folder / "adapters").glob("*.safetensors"))}
    score_adapters(setting, adapters)
    measure_adapters(setting, adapters)


if __name__ == "__main__":
    main(sys.argv[1])
