"""Whole jobs against another program: equal commands, ratios, and the losses as proof of equal work."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarking import peer, peer_commands
from sushi_research.errors import UserError


def test_the_losses_of_equal_work_agree_and_those_of_other_work_do_not() -> None:
    rng = np.random.default_rng(0)
    ours, same, other = (list(map(float, rng.gamma(2, mean / 2, 200))) for mean in (0.3, 0.3, 0.6))
    assert peer.losses_agree(ours, same, 200)["agree"]
    found = peer.losses_agree(ours, other, 200)
    assert not found["agree"] and found["difference"] > found["band"] > 0
    with pytest.raises(UserError, match="of 200 steps, ours recorded 200 losses and the peer 199"):
        peer.losses_agree(ours, same[1:], 200)


def job(side: str, kind: str, seconds: float, **more: object) -> dict:
    losses = [0.1 + 0.01 * (number % 7) for number in range(20)]
    times = {
        "seconds": seconds,
        "cpu_seconds": seconds / 2,
        "step_seconds": seconds / 100,
        "step_cpu_seconds": seconds / 200,
    }
    return {
        "side": side,
        "kind": kind,
        **times,
        "peak_process_bytes": 2**30,
        "allocated": None,
        "losses": losses,
        **more,
    }


def test_ratios_are_of_medians_of_the_jobs_of_one_kind() -> None:
    jobs = [job("ours", "cold", 20), job("peer", "cold", 22)]
    jobs += [job(side, "warm", seconds) for side, seconds in (("ours", 10), ("peer", 20), ("peer", 24), ("ours", 12))]
    found = peer.compare(jobs, 20)
    assert found["cold_job"]["ratio"] == pytest.approx(1.1)
    assert found["warm_job"]["ratio"] == found["warm_job_cpu"]["ratio"] == found["step"]["ratio"] == pytest.approx(2.0)
    assert (found["warm_job_cpu"]["low"], found["warm_job_cpu"]["high"]) == (20 / 12, 2.4)
    assert found["peak_bytes"]["what"] == "peak_process_bytes"
    result = {
        **found,
        "peer": "diffusers x.py",
        "model": "sd15",
        "config": {"steps": 20, "resolution": 64, "batch_size": 1, "precision": "fp32"},
        "machine": {"device": "cpu"},
    }
    assert "warm job 2.00 times" in peer.sentence(result) and "agree" in peer.sentence(result)
    assert peer.table_row(result, "f.json").count("|") == peer.TABLE_HEAD.splitlines()[0].count("|")


def test_both_sides_get_the_same_images_and_settings(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "more").mkdir()
    Image.new("RGB", (90, 60), "red").save(source / "a.png")
    (source / "a.txt").write_text("a red picture\n")
    Image.new("RGB", (90, 60), "red").save(source / "without_caption.png")
    assert peer_commands.make_images(source, tmp_path / "images", 32, batch_size=1) == 1
    with pytest.raises(UserError, match="has 1 images with a caption in a .txt file, fewer than a batch"):
        peer_commands.make_images(source, tmp_path / "more/images", 32, batch_size=2)
    assert json.loads((tmp_path / "images/metadata.jsonl").read_text()) == {
        "file_name": "a.png",
        "text": "a red picture",
    }
    assert (tmp_path / "kohya/1_images/a.txt").read_text() == "a red picture"
    assert Image.open(tmp_path / "images/a.png").size == (60, 60), "both sides resize it"
    options = argparse.Namespace(resolution=32, steps=20, batch_size=2, precision="fp32")
    base = tmp_path / "base"
    for name in ("tokenizer", "tokenizer_2"):
        (base / name).mkdir(parents=True)
        (base / name / "vocab.json").write_text(name)
    for name, settings in {
        "train_text_to_image_lora.py": {"rank": "16", "max_train_steps": "20", "train_batch_size": "2"},
        "sdxl_train_network.py": {"network_dim": "16", "max_train_steps": "20", "train_batch_size": "2"},
    }.items():
        words = peer_commands.COMMANDS[name](tmp_path, Path(name), base, options, "job")
        assert all(words[words.index(f"--{key}") + 1] == value for key, value in settings.items())
        architecture = peer_commands.architecture_of(Path(name))
        ours = peer_commands.our_command(tmp_path, Path(name), Path("base"), options, "job")
        assert ours[ours.index("--lora.rank") + 1] == "16"
        targets = {"diffusers": "attention", "kohya": "kohya"}[peer_commands.program_of(Path(name))]
        assert ours[ours.index("--lora.targets") + 1] == targets, "the layers that the peer adapts"
        clips = ours[ours.index("--train.max_grad_norm") + 1]
        assert clips == {"sd15": "null", "sdxl": "1.0"}[architecture], "diffusers' SD1.5 script clips nothing"
    for name, identity in (
        ("tokenizer", "openai_clip-vit-large-patch14"),
        ("tokenizer_2", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"),
    ):
        assert (tmp_path / "kohya_tokenizers" / identity / "vocab.json").read_text() == name, "not asked from the hub"
    with pytest.raises(UserError, match=r"other.py is not supported"):
        peer_commands.architecture_of(Path("other.py"))


SCRIPT = """
import importlib.util
def library_looks():
    code = compile("found = importlib.util.find_spec('torchvision')", LIBRARY, "exec")
    names = {"importlib": importlib, "__name__": "library"}
    exec(code, names)
    return names["found"]
assert library_looks() is None
import beside
from torchvision import transforms
from torchvision.transforms.functional import crop
from PIL import Image
import numpy as np
import torch
image = Image.new("RGB", (60, 40), (255, 0, 0))
steps = [transforms.Resize(20, interpolation=transforms.InterpolationMode.BILINEAR), transforms.CenterCrop(16),
         transforms.RandomHorizontalFlip(p=1.0), transforms.Lambda(lambda x: x), transforms.ToTensor(),
         transforms.Normalize([0.5], [0.5])]
assert transforms.ToTensor()(np.zeros((2, 3, 3), np.uint8)).shape == (3, 2, 3)
found = transforms.Compose(steps)(image)
assert found.shape == (3, 16, 16) and found[0].eq(1).all() and found[1:].eq(-1).all(), found
top, left, height, width = transforms.RandomCrop(20).get_params(image, (20, 20))
assert crop(image, top, left, height, width).size == (20, 20)
print("done")
"""


@pytest.mark.skipif(peer._has_torchvision(sys.executable), reason="the stand-in is for machines without torchvision")
def test_the_stand_in_is_found_by_the_script_and_by_no_library(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"LIBRARY = {str(tmp_path / 'venv/site-packages/library.py')!r}\n{SCRIPT}")
    (tmp_path / "beside.py").write_text("from torchvision import transforms")
    code = (
        "import runpy, sys; sys.path.insert(0, 'benchmarking'); import peer_job\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        f"sys.meta_path.insert(0, peer_job._ForTheScript('benchmarking/stand_ins', Path({str(tmp_path)!r})))\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=peer.ROOT, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


def test_a_comparison_with_kohyas_script_is_small_and_has_a_base_of_the_published_size(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("testing.full_base.save_full_base", lambda folder, architecture: folder / architecture)
    kohya, diffusers = Path("sdxl_train_network.py"), Path("train_text_to_image_lora.py")
    assert peer_commands.base_for(tmp_path, kohya, None)[0] == tmp_path / "base/sdxl"
    assert peer_commands.base_for(tmp_path, kohya, str(tmp_path)) == (tmp_path, str(tmp_path))
    assert peer_commands.base_for(tmp_path, diffusers, None)[0] == peer.ROOT / "demo/base/sd15"
    found = peer.parse(["--peer", str(kohya), "--rounds", "3"])
    assert (found.resolution, found.steps, found.batch_size, found.rounds) == (64, 20, 1, 3)
    assert peer.parse(["--peer", str(diffusers)]).steps == 100


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--peer-python", "nowhere/python"], "--peer-python nowhere/python is not a program"),
        (["--images", "nowhere"], "--images nowhere is not a folder"),
    ],
)
def test_wrong_options_are_one_sentence(words: list[str], reason: str, tmp_path: Path, capsys) -> None:
    script = tmp_path / "train_text_to_image_lora.py"
    script.touch()
    with pytest.raises((UserError, SystemExit)) as caught:
        peer.main(peer.parse(["--peer", str(script), *words]))
    assert reason in str(caught.value) + capsys.readouterr().err


def test_a_job_that_fails_is_named_with_its_last_line(tmp_path: Path, capsys) -> None:
    script = tmp_path / "broken.py"
    script.write_text("print('a first line')\nraise ValueError('no such base')")
    with pytest.raises(UserError, match="broken.py ended with status 1 .ValueError: no such base.: see"):
        peer.run_job(tmp_path, sys.executable, [str(script)], with_stand_in=False)
    assert "a first line" in capsys.readouterr().err
