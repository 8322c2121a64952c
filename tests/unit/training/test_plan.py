"""The plan tells the truth, in numbers that can be checked by hand."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sushi_research import files
from sushi_research.caches import encoding
from sushi_research.caches.caches import Caches
from sushi_research.caches.inputs import Inputs
from sushi_research.caches.store import Store
from sushi_research.config import SD15Training, SDXLTraining
from sushi_research.config.sets import sets_of
from sushi_research.data.buckets import BucketRule
from sushi_research.data.items import make_items
from sushi_research.data.samples import Sample
from sushi_research.data.scan import Problem, Scan
from sushi_research.data.training_data import Data
from sushi_research.errors import UserError
from sushi_research.models import loading, sd15, sdxl
from sushi_research.runs.job import Job
from sushi_research.training import plan
from sushi_research.training.trainable import adapter_shapes

ONE = pytest.mark.parametrize("architecture", ["sd15"])
MODELS = {"sd15": (sd15, SD15Training), "sdxl": (sdxl, SDXLTraining)}


@pytest.fixture
def make(bases, architecture, tmp_path, capsys):
    """The plan for five pictures, one of them shown three times, in two buckets; and what was printed."""

    def run(
        changes: dict[str, dict] | None = None,
        skipped: int = 0,
        notes: tuple[str, ...] = (),
        processes: int = 1,
    ):
        model, config_class = MODELS[architecture]
        sections = {"model": {"base": "x"}, "data": {"path": "x", "resolution": 64, "bucket_step": 32}}
        sections |= {"train": {"steps": 4, "batch_size": 2}, "optimizer": {"name": "adamw"}}
        for section, values in (changes or {}).items():
            sections[section] = sections.get(section, {}) | values
        config = config_class(**sections)
        sizes = [(64, 64), (64, 64), (64, 64), (130, 70), (130, 70)]
        samples = [
            Sample(f"{n}.png", str(n), f"caption {n}", *size, 1 + 2 * (n == 3), bytes) for n, size in enumerate(sizes)
        ]
        samples[0] = Sample("0.png", "0", "y" * 100, 64, 64, 1, bytes)
        items, _ = make_items(samples, BucketRule(resolution=64, step=32, min_side=32, max_side=128))
        base = loading.resolve_base(str(bases[architecture]))
        caches = Caches(
            Store.open(tmp_path / "latents", encoding.LATENT_TENSORS, repair=True),
            Store.open(tmp_path / "text", model.TEXT_TENSORS, repair=True),
            "vae",
            torch.float32,
            tuple(model.TEXT_ENCODERS),
            {},
        )
        with caches.latents.writer() as writer:
            key = caches.latent_key(items[0], False)
            if key not in caches.latents:
                writer.add(key, {"mean": torch.zeros(4, 8, 8).half(), "std": torch.zeros(4, 8, 8).half()}, {})
        scan = Scan(
            "photos", problems=[Problem(f"bad_{n}.png", "the file is empty") for n in range(skipped)], notes=list(notes)
        )
        accelerator = SimpleNamespace(num_processes=processes, is_main_process=True, device=torch.device("cpu"))
        job = Job(config, model, accelerator, "fp32")
        result = plan.make_plan(
            job, Inputs(config, base, Data(items, scan, sets=sets_of(config)), caches, hash_cache=None)
        )
        return result.to_json(), capsys.readouterr().out.removesuffix("\n")

    return run


def test_the_numbers(make, architecture):
    found, text = make({"train": {"accumulation": 2}})
    expected = {
        "architecture": architecture,
        "images": 5,
        "items_per_epoch": 7,
        "buckets": {"96x32": 4, "64x64": 3},
        "skipped": [],
        # 100 bytes, a start and an end token; 77 are kept.
        "captions_cut": {"y" * 100: 25},
        "global_batch_size": 4,
        "split": {"batch_size": 2, "accumulation": 2, "processes": 1},
        "steps": 4,
        "samples": 16,
        "epochs": 2.29,
        "samples_per_image": 3.2,
    }
    assert {key: found[key] for key in expected} == expected
    # A picture's mean and deviation: 2 x 4 channels x 64 latent pixels (96x32: 48) x 2 bytes.
    assert found["cache"]["images"] == {"needed": 5, "missing": 4, "bytes": 3 * 1024 + 2 * 768}
    row = {"sd15": 77 * 32, "sdxl": 77 * 64 + 32}[architecture]
    # Five captions, the empty one, and the first caption again as a prompt, in two chunks.
    assert found["cache"]["captions"] == {"needed": 7, "missing": 7, "bytes": 8 * 2 * row}
    assert found["dtypes"]["activations"] == "float32"
    assert "buckets      2: 64x64 (3), 96x32 (4)" in text or "buckets      2: 96x32 (4), 64x64 (3)" in text
    for part in (
        "images       5 (7 per epoch with repeats)",
        "step         4 samples = batch 2 x accumulation 2 x processes 1; micro-batches 100% full",
        "length       4 optimizer steps = 16 samples = 2.29 epochs; each image 3.2 times on average",
        "cache        4 of 5 image entries to encode (4 KiB in all), 7 of 7 captions",
        "captions     1 longer than 77 tokens are cut (the longest loses 25); a run's plan.json lists them",
    ):
        assert part in text, text


@ONE
def test_long_prompts_are_not_cut_and_take_the_room_of_their_chunks(make):
    short, _ = make({"sample": {"prompts": ["a cat"]}})
    found, _ = make({"sample": {"prompts": ["p" * 80, "y" * 160], "negative_prompt": "n" * 76}})
    assert found["captions_cut"] == {"y" * 100: 25}, "a caption that is no prompt"
    captions, before = found["cache"]["captions"], short["cache"]["captions"]
    # Three texts in place of the short prompt, of 2 + 3 + 2 chunks.
    assert captions["needed"] == captions["missing"] == before["needed"] - 1 + 3
    assert captions["bytes"] == (before["needed"] - 1 + 7) * before["bytes"] / before["needed"]
    assert "y" * 100 in make({"sample": {"prompts": [], "enabled": True}})[0]["captions_cut"], (
        "a caption is cut in training"
    )


@ONE
def test_the_fill_of_micro_batches(make):
    # A batch of 5: the first epoch's one whole step holds 5 samples of both buckets, so it takes two micro-batches.
    found, text = make({"train": {"batch_size": 5}})
    assert found["micro_batch_fill"] == 0.5
    assert "micro-batches 50% full" in text


@ONE
def test_both_mirror_images_are_counted(make):
    found, _ = make({"data": {"flip": 0.5}})
    assert found["cache"]["images"] == {"needed": 10, "missing": 9, "bytes": 2 * (3 * 1024 + 2 * 768)}


@ONE
def test_processes_share_a_step(make):
    found, text = make(processes=2)
    assert found["global_batch_size"] == 4 and found["split"]["processes"] == 2
    assert "step         4 samples = batch 2 x accumulation 1 x processes 2" in text


@ONE
def test_what_was_skipped_or_noted_is_named(make):
    found, text = make(skipped=13, notes=("b.txt: a caption without an image",))
    assert "notes        b.txt: a caption without an image" in text
    assert len(found["skipped"]) == 13
    assert found["skipped"][0] == {"name": "bad_0.png", "reason": "the file is empty"}
    assert "skipped      13:" in text and "bad_9.png: the file is empty" in text
    assert "bad_10.png" not in text and "and 3 more (a run's data_report.json lists them)" in text


@pytest.mark.slow
def test_the_shapes_of_the_adapter_are_known_without_its_weights(bases, architecture):
    """Against the adapter that a training attaches; at the real configs, tests/models counts it."""
    from sushi_research.adapters import lora
    from sushi_research.adapters.settings import AdapterSettings

    base = loading.resolve_base(str(bases[architecture]))
    unet = loading.load_unet(base, torch.float32, torch.device("cpu"))
    lora.attach(unet, AdapterSettings(targets="kohya_conv", rank=3, alpha=1.0, dropout=0.0, init="default", seed=0))
    trainable = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    shapes = adapter_shapes(loading.empty_unet(base), AdapterSettings(targets="kohya_conv", rank=3, alpha=1.0))
    assert list(shapes.values()) == [tuple(parameter.shape) for parameter in trainable]


@ONE
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"targets": ["to_z"]}}, "to_z fits no module"),
        ({"optimizer": {"kwargs": {"weight_decy": 0.1}}}, "did you mean weight_decay"),
        ({"optimizer": {"name": "torch.optim.Adm"}}, "did you mean Adam"),
        (
            {"train": {"steps": None, "epochs": 1}, "schedule": {"name": "linear", "warmup": 4}},
            "schedule.warmup is 4 steps, and the run has 4: ",
        ),
    ],
)
def test_what_cannot_be_trained_is_reported_by_the_plan(make, changes, message):
    with pytest.raises(UserError, match=message):
        make(changes)


def test_sizes_as_a_person_reads_them():
    assert [files.size_text(count) for count in (0, 1023, 1024, 1536 * 1024, 5 * 2**30, 3000 * 2**30)] == [
        "0 bytes",
        "1023 bytes",
        "1 KiB",
        "2 MiB",
        "5.0 GiB",
        "3000.0 GiB",
    ]


@ONE
def test_paths_are_not_touched(make, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if Path(path).is_file()}
    assert before == {}
    make()
    assert {path.parent.name for path in tmp_path.rglob("*") if path.is_file()} == {"latents"}, "a plan writes nothing"
