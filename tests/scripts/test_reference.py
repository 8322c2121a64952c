"""The scripts against plain PyTorch and diffusers: the loss and the adapter's gradients of whole steps.

Nothing here comes from the package but `randomness.key`, the documented scheme that names a random stream. Where a
picture lies in its bucket is worked out by hand in PICTURES; the samples are computed one by one, and the adapter is
merged into the weights: (W + alpha / rank * B A) x.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from script_runs import RecordingSGD, Trainer, largest_difference

from sushi_research.randomness import key

STEPS, SEED, RANK, ALPHA = 2, 3, 4, 2.0
# Large, so that B is no longer near zero in the second step, where A has gradients for the first time.
RATE = 100.0


@dataclass(frozen=True)
class Picture:
    """A picture's size, its way into a bucket at resolution 64 with sides in steps of 32, and its caption."""

    size: tuple[int, int]  # width, height
    resized: tuple[int, int]
    corner: tuple[int, int]  # left, top
    bucket: tuple[int, int]
    file: str
    caption: str
    repeats: int = 1


# The buckets are 64x64, 96x32, 128x32 and the transposes of those; the closest by aspect ratio is filled.
PICTURES = [
    Picture((64, 64), (64, 64), (0, 0), (64, 64), "2_often/square.png", "a plate", repeats=2),
    Picture((100, 100), (64, 64), (0, 0), (64, 64), "large.jpg", "a large plate"),
    # Mirrored, it is cut at 17 from the left.
    Picture((97, 64), (97, 64), (16, 0), (64, 64), "2_often/wide.webp", "a plate", repeats=2),
    Picture((64, 96), (64, 96), (0, 16), (64, 64), "tall.png", " ".join(["more than 77 tokens"] * 5)),
    Picture((130, 70), (96, 52), (0, 10), (96, 32), "wider.png", "salmon"),
    Picture((40, 131), (32, 105), (0, 4), (32, 96), "taller.jpg", "a tall plate"),
]
# A step is an epoch, so its samples are known without knowing their order; the batches of 2 make five micro-batches.
GROUP = sum(picture.repeats for picture in PICTURES)
BATCH = 2


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number, picture in enumerate(PICTURES):
        coarse = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        file = folder / picture.file
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(coarse).resize(picture.size, Image.Resampling.BICUBIC).save(file)
        file.with_suffix(".txt").write_text(picture.caption)
    return folder


@dataclass
class Reference:
    """Training by its definition, on the adapter `lora`: name -> tensor that requires a gradient."""

    architecture: str
    base: Path
    folder: Path
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    flip: float = 0.0
    time_ids: str = "image"
    clip_skip: int = 1
    # What the base's scheduler config says otherwise.
    predicts: dict[str, Any] = field(default_factory=dict)
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        import diffusers

        name = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}[self.architecture]
        self.pipeline = getattr(diffusers, name).from_pretrained(self.base)
        if self.predicts.get("_class_name") == "FlowMatchEulerDiscreteScheduler":
            self.schedule = diffusers.FlowMatchEulerDiscreteScheduler(shift=self.predicts["shift"])
        else:
            settings = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, **self.predicts}
            self.schedule = diffusers.DDPMScheduler(**settings)
        self.unet = self.pipeline.unet.requires_grad_(False).train()
        self.lora = {}
        for path, module in self.unet.named_modules():
            if path.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")):
                bound = np.float32(1 / module.in_features**0.5)
                uniform = key(SEED, "adapter-init", path).random((RANK, module.in_features), dtype=np.float32)
                self.lora[f"{path}.lora_A.weight"] = torch.from_numpy((2 * uniform - 1) * bound)
                self.lora[f"{path}.lora_B.weight"] = torch.zeros(module.out_features, RANK)
        for tensor in self.lora.values():
            tensor.requires_grad_()

    def step(self, epoch: int) -> tuple[float, dict[int, float]]:
        """The loss of a step, and the mean squared errors by timestep bin; the gradients are left in `lora`."""
        for tensor in self.lora.values():
            tensor.grad = None
        total, timestep_bins = torch.zeros(()), defaultdict(list)
        for picture in PICTURES:
            for instance in range(picture.repeats):
                timestep, error, weight = self.sample(picture, epoch, instance)
                total = total + weight * error / GROUP
                timestep_bins[timestep // 250].append(error.item())
        total.backward()
        return total.item(), {timestep_bin: float(np.mean(errors)) for timestep_bin, errors in timestep_bins.items()}

    def sample(self, picture: Picture, epoch: int, instance: int) -> tuple[int, torch.Tensor, float]:
        """A sample's timestep, the mean squared error of its predicted noise, and the weight of that."""
        file = self.folder / picture.file
        content = hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()

        def stream(purpose: str) -> np.random.Generator:
            return key(SEED, purpose, epoch, content, instance)

        def normal(purpose: str, *shape: int) -> torch.Tensor:
            return torch.from_numpy(stream(purpose).standard_normal(shape, dtype=np.float32))

        (left, top), (width, height) = picture.corner, picture.bucket
        with Image.open(file) as image:
            resized = image.convert("RGB").resize(picture.resized, Image.Resampling.LANCZOS)
        cut = resized.crop((left, top, left + width, top + height))
        if self.flip and stream("flip").random() < self.flip:
            cut = ImageOps.mirror(cut)
            left = picture.resized[0] - width - left
        posterior = self.pipeline.vae.encode(
            torch.from_numpy(np.array(cut)).permute(2, 0, 1)[None].float() / 127.5 - 1
        ).latent_dist
        # The caches hold fp16: mean, standard deviation and text are rounded once.
        mean, std = (value.detach().half().float() for value in (posterior.mean, posterior.std))
        shape = (4, height // 8, width // 8)
        latents = (mean + std * normal("posterior", *shape)) * self.pipeline.vae.config.scaling_factor

        noise = normal("noise", *shape)[None]
        if self.noise_offset:
            noise = noise + self.noise_offset * normal("noise_offset", 4).view(1, 4, 1, 1)
        timestep = torch.tensor([stream("timestep").integers(1000)])
        noised = self.flow if hasattr(self.schedule, "scale_noise") else self.diffusion
        noisy, time, goal, weight = noised(latents, noise, timestep)
        predicted = self.predict(noisy, time, picture, (left, top))
        error = torch.nn.functional.mse_loss(predicted, goal)
        return timestep.item(), error, 1.0 if self.snr_gamma is None else weight

    def diffusion(
        self, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
        """The UNet's input and time, its target, and the min-SNR weight."""
        from diffusers.training_utils import compute_snr

        v = self.schedule.config.prediction_type == "v_prediction"
        goal = self.schedule.get_velocity(latents, noise, timestep) if v else noise
        snr = compute_snr(self.schedule, timestep).item()
        weight = min(snr, self.snr_gamma or 0) / (snr + 1 if v else snr)
        return self.schedule.add_noise(latents, noise, timestep), timestep, goal, weight

    def flow(
        self, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
        """The same of a rectified flow, as in diffusers' training script of SD3 (without its preconditioning)."""
        time = self.schedule.timesteps[999 - timestep]  # most noise first
        sigma = time.item() / 1000
        # An error e of the prediction is sigma e of the image, whose error min-SNR weights by min(SNR, gamma).
        weight = min(((1 - sigma) / sigma) ** 2, self.snr_gamma or 0) * sigma**2
        return self.schedule.scale_noise(latents, time, noise), time, noise - latents, weight

    def predict(
        self, noisy: torch.Tensor, timestep: torch.Tensor, picture: Picture, corner: tuple[int, int]
    ) -> torch.Tensor:
        merged = {}
        for path in {name.rpartition(".lora_")[0] for name in self.lora}:
            up, down = self.lora[f"{path}.lora_B.weight"], self.lora[f"{path}.lora_A.weight"]
            merged[f"{path}.weight"] = self.unet.get_submodule(path).weight + ALPHA / RANK * up @ down
        added: dict[str, Any] = {}
        if self.architecture == "sd15":
            hidden = self.hidden(picture.caption)
        else:
            hidden, _, pooled, _ = self.pipeline.encode_prompt(picture.caption, None, "cpu", 1, False)
            original, target = (picture.size[1], picture.size[0]), (picture.bucket[1], picture.bucket[0])
            sizes = (*original, corner[1], corner[0], *target)
            if self.time_ids == "bucket":
                sizes = (*target, 0, 0, *target)
            added = {"text_embeds": pooled.half().float(), "time_ids": torch.tensor([sizes], dtype=torch.float32)}
        inputs = (noisy, timestep, hidden.half().float())
        options = {"added_cond_kwargs": added, "return_dict": False}
        return torch.func.functional_call(self.unet, merged, inputs, options)[0]

    @torch.no_grad()
    def hidden(self, caption: str) -> torch.Tensor:
        if self.clip_skip == 1:
            return self.pipeline.encode_prompt(caption, "cpu", 1, False)[0]
        # Written out: the pipeline's own clip_skip fails with transformers 5, whose CLIPTextModel has no `text_model`.
        ids = self.pipeline.tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt").input_ids
        states = self.pipeline.text_encoder(ids, output_hidden_states=True).hidden_states
        return self.pipeline.text_encoder.final_layer_norm(states[-self.clip_skip])


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.5}
V_TO_PURE_NOISE = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}

# (architecture, settings of the script, the same for the reference)
CASES = {
    "sd15, weighted, clipped, some mirrored": (
        "sd15",
        {
            "loss.snr_gamma": 5.0,
            "loss.noise_offset": 0.1,
            "data.flip": 0.5,
            "model.clip_skip": 2,
            "train.max_grad_norm": 0.01,
        },
        {"snr_gamma": 5.0, "noise_offset": 0.1, "flip": 0.5, "clip_skip": 2, "max_grad_norm": 0.01},
    ),
    "sdxl, weighted, mirrored": (
        "sdxl",
        {"loss.snr_gamma": 5.0, "loss.noise_offset": 0.1, "data.flip": 1.0},
        {"snr_gamma": 5.0, "noise_offset": 0.1, "flip": 1.0},
    ),
    "sdxl, sizes of the bucket, activations computed twice": (
        "sdxl",
        {"data.time_ids": "bucket", "train.gradient_checkpointing": True},
        {"time_ids": "bucket"},
    ),
    "sd15, v": ("sd15", {}, {"predicts": {"prediction_type": "v_prediction"}}),
    "sdxl, v down to pure noise, weighted": (
        "sdxl",
        {"loss.snr_gamma": 5.0, "loss.noise_offset": 0.1},
        {"snr_gamma": 5.0, "noise_offset": 0.1, "predicts": V_TO_PURE_NOISE},
    ),
    "sdxl, rectified flow, weighted": ("sdxl", {"loss.snr_gamma": 5.0}, {"snr_gamma": 5.0, "predicts": FLOW}),
}


@pytest.mark.parametrize(("architecture", "settings", "same"), CASES.values(), ids=CASES)
@pytest.mark.slow
def test_loss_and_gradients_equal_a_plain_reference(
    architecture: str,
    settings: dict[str, Any],
    same: dict[str, Any],
    bases: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RecordingSGD, "gradients", [])
    base = bases[architecture]
    if "predicts" in same:
        base = shutil.copytree(base, tmp_path / "base")
        scheduler = base / "scheduler/scheduler_config.json"
        kept = {} if "_class_name" in same["predicts"] else json.loads(scheduler.read_text())
        scheduler.write_text(json.dumps(kept | same["predicts"]))
    trainer = Trainer(architecture, base, pictures, tmp_path, tmp_path / "cache")
    always = {
        "optimizer.name": "script_runs.RecordingSGD",
        "optimizer.lr": RATE,
        "train.max_grad_norm": None,
        "train.steps": STEPS,
        "train.seed": SEED,
        "train.batch_size": BATCH,
        "train.accumulation": GROUP // BATCH,
        "lora.targets": "attention",
        "lora.rank": RANK,
        "lora.alpha": ALPHA,
    }
    assert trainer.train("run", {**always, **settings}) == 0
    assert trainer.plan("run")["buckets"] == {"32x96": 1, "64x64": 6, "96x32": 1}
    assert list(trainer.plan("run")["captions_cut"]) == ["more than 77 tokens " * 4 + "more than 77 tokens"]

    # fp32 throughout, but a batch is computed at once here and one by one there, and the adapter is added here and
    # merged there. Seen: losses equal to 4e-7, gradients to 5e-5 of a tensor's largest, which is also what either
    # differs by from the same in float64. Whatever is wrong in data, noise or weights shows in the second digit.
    reference = Reference(architecture, base, pictures, **same)
    recorded = RecordingSGD.gradients[-STEPS:]  # after those of the plan's check of the optimizer
    for step, line in enumerate(trainer.metrics("run")):
        loss, timestep_bins = reference.step(epoch=step)
        assert line["loss"] == pytest.approx(loss, rel=2e-6)
        logged = {timestep_bin: line[f"loss_by_timestep/{timestep_bin}"] for timestep_bin in range(4)}
        assert {timestep_bin: mean for timestep_bin, mean in logged.items() if mean} == pytest.approx(
            timestep_bins, rel=2e-6
        )
        norm = sum(tensor.grad.square().sum().item() for tensor in reference.lora.values()) ** 0.5
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)
        clip = 1.0
        if reference.max_grad_norm is not None:
            assert norm > reference.max_grad_norm, "the case would not notice"
            clip = reference.max_grad_norm / (norm + 1e-6)  # torch's guard against a norm of zero
        for (name, tensor), found in zip(reference.lora.items(), recorded[step], strict=True):
            expected = tensor.grad * clip
            largest = expected.abs().max()
            assert (found - expected).abs().max() <= 2e-4 * largest, f"step {step}, {name}"
            # B is zero before the first step, so A has no gradient in it.
            assert (largest == 0) == (step == 0 and "lora_A" in name)
            with torch.no_grad():
                tensor -= RATE * expected
    assert list(trainer.master_weights("run")) == list(reference.lora)
    assert largest_difference(trainer.master_weights("run"), reference.lora) < 2e-6


# Of four steps of AdamW at a rate that shows in the loss, recorded on a CPU with the versions in constraints.txt.
LOSSES = {
    "sd15": [1.12679160, 1.06974876, 1.08344972, 1.02224004],
    "sdxl": [1.17440367, 1.11997426, 1.12630248, 1.07963145],
}


def test_the_first_four_losses_are_as_recorded(architecture: str, trainer: Trainer) -> None:
    settings = {"train.steps": 4, "train.batch_size": 2, "train.accumulation": 2, "optimizer.lr": 0.03}
    settings["lora.targets"] = "attention"
    assert trainer.train("run", settings) == 0
    # Relative: matrix products differ in the last digits between processors, and Adam turns a gradient's sign into a
    # whole step.
    assert [line["loss"] for line in trainer.metrics("run")] == pytest.approx(LOSSES[architecture], rel=1e-4)
