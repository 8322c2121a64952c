"""Evaluates adapter files of any trainer, and their base, on the validation set that training runs are evaluated on.

    python scripts/evaluate.py sdxl --config runs/NAME/config.yaml --adapters '[other.safetensors]'
    python scripts/evaluate.py sdxl --config configs/sdxl_lora.yaml --data.path held_out --adapters '[a.safetensors]'

It takes the options of that architecture's training script, and three of its own. If the options hold out no images, all images
of `data.path` are the validation set. A file that was trained on some of them is refused; one that does not say what it was trained
on is measured, with a note. For each adapter and LoRA scale it measures the loss for every image and noise sample, the loss
difference from the base, and the drift, and it generates images for the sample prompts. From them it tells what an adapter learned
and what it kept of the base; and, if the options hold images out of the training data, what it memorised. With
evaluation.pictures it also generates pictures of fixed prompts and measures them. scripts/compare_runs.py reads the folders it
writes, together with those of runs.
"""

from __future__ import annotations

import sys

from sushi_research import models, stopping
from sushi_research.config.other_scripts import AdapterEvaluation, evaluation_config
from sushi_research.config.process import read_architecture, run_main
from sushi_research.config.sets import paths_of

INTRO = """\
This evaluates adapter files on images that they were not trained on. To begin:
  a run's steps:    python scripts/evaluate.py sdxl --config runs/NAME/config.yaml --adapters '[runs/NAME@250, runs/NAME]'
  by themselves:    python scripts/evaluate.py sdxl --config configs/sdxl_lora.yaml --data.path FOLDER --adapters '[a.safetensors]'
  every LoRA scale: ... --lora_scales '[0.25, 0.5, 0.75, 1.0, 1.25]'
  every option:     python scripts/evaluate.py sdxl --help"""


def read(arguments: list[str]) -> AdapterEvaluation:
    """Reads the config from the command line, whose first word is the architecture."""
    classes = {name: evaluation_config(kind) for name, kind in models.config_classes().items()}
    return read_architecture(classes, arguments, script="scripts/evaluate.py", intro=INTRO, example="sdxl")


if __name__ == "__main__":
    CONFIG = read(sys.argv[1:])

import contextlib
import functools
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from sushi_research.adapters import other_prediction, run_files
from sushi_research.adapters.loading import load_adapters, load_pipeline, matches_of
from sushi_research.adapters.reading import adapts_text, read_adapter
from sushi_research.caches.caches import Caches, open_caches, open_hash_cache, open_remembered
from sushi_research.caches.inputs import Inputs, fill_caches
from sushi_research.data import findings
from sushi_research.data.dataset_hash import dataset_hash
from sushi_research.data.training_data import Data, read_data
from sushi_research.errors import UserError
from sushi_research.evaluation import adapter_files, pictures, validation_set
from sushi_research.evaluation.unseen import chosen_on, describe, may_have_seen, require_unseen
from sushi_research.files import system_errors
from sushi_research.models import storage
from sushi_research.models.loading import find_base
from sushi_research.remembered import Remembered
from sushi_research.runs.job import Job
from sushi_research.runs.launch import one_report
from sushi_research.sampling import sample_grids
from sushi_research.sampling.lora_scale import scaled
from sushi_research.terminal import say
from sushi_research.training import evaluating, evaluating_pictures, identity_facts, run
from sushi_research.training.disk_plan import require_room_for_cache


@one_report()
@system_errors()
def main(config: AdapterEvaluation) -> int:
    """Evaluates the base and the adapters of `config`; returns 0."""
    model = models.load(models.name_of(config))
    config = config.model_copy(update={"adapters": run_files.resolve_all(config.adapters)})
    job = run.start_job(config, model, __file__, trains=False)
    written: list[str] = []

    def kept() -> str:
        if config.dry_run:
            return "a dry run evaluates nothing; the same command again starts over"
        states = 1 + len(config.adapters) * len(config.lora_scales)
        return (
            f"what is encoded is kept in {config.cache.folder}, and {len(written)} of {states} results are written, to "
            f"{config.output}; the same command again measures all of them"
        )

    with stopping.doing(lambda: job.timings.current, kept):
        evaluate(job, written)
    return 0


def evaluate(job: Job, written: list[str]) -> None:
    """Evaluates the base and each adapter at each LoRA scale, and appends the name of each folder that it has written."""
    config, model = job.config, job.model
    for path in config.adapters:  # fail fast: nothing is loaded or encoded yet
        for note in read_adapter(path).notes:
            job.say(f"note: {note}")
    names = adapter_files.folder_names(config.adapters, config.lora_scales, Path(config.output))
    hash_cache, remembered = open_hash_cache(config), open_remembered(config)
    storage.require_usable(config.model.base_storage, job.compute_dtype, job.device)
    base = find_base(config, model)
    for note in other_prediction.notes(config.adapters, base.prediction):
        job.say(f"note: {note}")
    data = validation_data(job, remembered)
    source = config.evaluation.path or paths_of(config)
    samples = [item.sample for item in data.held_out]
    unseen = require_unseen(config.adapters, samples, source, lambda: hash_of_source(job, remembered))
    if data.prior:
        prior = [item.sample for item in data.prior]
        require_unseen(
            config.adapters, prior, str(config.evaluation.prior_path), lambda: None, "--evaluation.prior_path"
        )
    caches = open_caches(job, base, hash_cache)
    inputs = Inputs(config, base, data, caches, hash_cache)
    hashes = identity_facts.hashes_of(job, inputs)
    base_hash = hashes["base_model"]["unet"]
    sets = identity_facts.measured_sets_of(job, inputs, base_hash)
    val_set = sets.validation
    entry = identity_facts.provenance_of(job, inputs, hashes, val_set, None)
    share_of_data = f" (evaluation.held_out {config.evaluation.held_out:g})" if config.evaluation.held_out else ""
    job.say(
        f"{len(set(val_set.names))} images of {source}{share_of_data} x {val_set.noise_samples} noise samples: "
        f"validation set {val_set.hash}"
    )
    for line in findings.lines(data.problems, data.notes):
        job.say(line)
    if unseen:
        job.say(*describe(unseen), *chosen_on(config.adapters, val_set.hash, val_set.names))
    if sets.trained is not None:
        job.say(
            f"what is memorised is measured on {len(sets.trained.names)} images of {paths_of(config)}, as training images"
        )
    require_room_for_cache(job, inputs)
    if config.dry_run:
        return
    fill_caches(job, inputs)
    job.timings.enter("evaluating")
    text = model.load_text(base, job.device)
    pipeline = load_pipeline(base, model, text, job.compute_dtype, job.device, config.model.base_storage)
    for path in config.adapters:  # nothing is measured yet
        matches_of(pipeline, path)
    unet = pipeline.unet
    measure = evaluating.open_drift(job, inputs, base_hash, unet)
    store = evaluating.open_pictures(job, inputs, sets, unet)

    image_sets = {name: getattr(sets, name) for name in evaluating.IMAGE_SETS if getattr(sets, name)}
    share = job.sharing()

    def losses(names: Collection[str], encoded: Any) -> dict[str, np.ndarray]:
        """The losses on these sets of images; `encoded` encodes a caption, None reads the cache."""
        return {
            name: validation_set.losses(image_sets[name], model, unet, caches, base.prediction, text=encoded, **share)
            for name in names
        }

    base_losses = losses(image_sets, None)
    if measure:
        measure.remember_base(unet)
        base_losses |= {"drift": np.zeros_like(measure.base_loss), "base_images": measure.base_loss}
    results: list[adapter_files.Result] = []

    def evaluate_one(
        name: str, lora_scale: float, encoded: Any, facts: dict[str, Any] | None, measured: Collection[str]
    ) -> None:
        """Measures the UNet in its current state on these sets of images, generates samples, and writes one folder.

        `encoded` encodes a caption; None reads the cache.
        """
        loss = losses(measured, encoded)
        if measure:
            loss["drift"], loss["base_images"] = measure.measure(unet, encoded)
        found = {each: (values, base_losses[each]) for each, values in loss.items()}
        with job.main_process_writes():
            if job.is_main:
                with evaluating_pictures.advice(f"generating the pictures of {name}"):
                    of_name = unet if facts else None  # the base's are in the store
                    generated = [
                        pictures.generate(job, inputs, each, store, of_name, encoded) for each in sets.pictures
                    ]
                    drawn = pictures.decode(job, inputs, generated) if generated else []
                found |= {each.picture_set.name: (each.distance, each.base_distance) for each in generated}
                adapter_files.require_finite(name, lora_scale, (values for values, _ in found.values()))
                rows = sample_grids.rows_of(config, inputs.prompts)
                prompts = prompt_encoder(model, pipeline, text, caches) if encoded else None
                images = sample_grids.generate_images(job, inputs, unet, prompts) if config.sample.enabled else []
                result = adapter_files.Result(name, lora_scale, found, rows, images)
                results.append(result)
                try:
                    adapter_files.write(Path(config.output), result, sets, entry | {"adapter": facts})
                except UserError:
                    say(*adapter_files.table(results, val_set).split("\n"))  # what was measured is not lost
                    raise
                if drawn:
                    adapter_files.write_pictures(Path(config.output), name, pictures.rows_of(sets.pictures), drawn)
                written.append(name)

    evaluate_one("base", 0.0, None, None, image_sets)
    for number, path in enumerate(config.adapters):
        [adapter] = load_adapters(pipeline, [path])
        changes_text = adapts_text(path)
        # What is memorised is not measured of a file that says it was not trained on these images.
        measured = [name for name in image_sets if name != "trained" or may_have_seen(path, sets.trained.names)]
        for lora_scale in config.lora_scales:
            adapter.activate(lora_scale)
            encoded = encoder(model, text, caches) if changes_text else None
            facts = adapter_files.adapter_facts(Path(path), lora_scale, changes_text, unseen[path], val_set)
            evaluate_one(names[number, lora_scale], lora_scale, encoded, facts, measured)
        adapter.remove()
    if job.is_main:
        job.timings.enter("saving")
        say(*adapter_files.table(results, val_set).split("\n"), "")  # before anything is written
        say(*adapter_files.finish(Path(config.output), results, val_set).split("\n"))


def validation_data(job: Job, remembered: Remembered) -> Data:
    """Reads the data as a training script does; if the options hold out no images, all are in `held_out` and none in `items`, but
    for prior images, which are all in `prior`, and for regularisation images, which are in neither. Nothing is trained, so
    the captions are not those of a training."""
    data = replace(read_data(job, remembered), captions=None)
    if data.held_out:
        return data
    distinct = {(item.sample.image_hash, item.sample.caption): item for item in data.learned}
    own = {key: item for key, item in distinct.items() if key[0] not in data.prior_trained}
    if not own:
        raise UserError(
            f"{paths_of(job.config)} has no images but those of evaluation.prior_path, and what is learned is measured on others: "
            "give some (--data.path or --evaluation.path)."
        )
    prior = [*data.prior, *(item for key, item in distinct.items() if key not in own)]
    return replace(data, items=data.items[:0], held_out=list(own.values()), prior=prior)


def hash_of_source(job: Job, remembered: Remembered) -> str:
    """The dataset hash of a run that trains on all images there are where the validation images are from."""
    config = job.config
    data, evaluation = config.data, config.evaluation
    if evaluation.path is not None:
        revision = data.revision if evaluation.path == data.path else None
        changes = {"path": evaluation.path, "sets": [], "split": evaluation.split or data.split, "revision": revision}
        data = data.model_copy(update=changes)
    nothing = evaluation.model_copy(update={"held_out": 0.0, "path": None, "prior_path": None})
    plain = config.model_copy(update={"data": data, "evaluation": nothing})
    return dataset_hash(read_data(replace(job, config=plain), remembered).items, remembered)


def encoder(model: ModuleType, text: Any, caches: Caches) -> Any:
    """A function that encodes captions with text encoders that an adapter has changed, each caption once.

    Like the cache, it stores fp16 on the CPU.
    """
    known: dict[str, dict[str, torch.Tensor]] = {}

    def encode(caption: str) -> dict[str, torch.Tensor]:
        if caption not in known:
            with torch.no_grad():
                tensors, _ = model.encode_caption(text, caption, caches.chunks, **caches.text_settings)
            known[caption] = {name: tensor.half().cpu() for name, tensor in tensors.items()}
        return known[caption]

    return encode


def prompt_encoder(model: ModuleType, pipeline: Any, text: Any, caches: Caches) -> Any:
    """A function that encodes prompts with text encoders that an adapter has changed, at `scale` times the scale that is set."""
    encoders = [getattr(pipeline, name) for name in model.TEXT_ENCODERS]

    @functools.cache
    def encode(prompt: str, scale: float) -> dict[str, torch.Tensor]:
        with torch.no_grad(), contextlib.ExitStack() as scales:
            for encoder in encoders:
                scales.enter_context(scaled(encoder, scale))
            tensors = model.encode_prompt(text, prompt, **caches.text_settings)
        return {name: tensor.half().cpu() for name, tensor in tensors.items()}

    return encode


if __name__ == "__main__":
    run_main(main, CONFIG)
