"""`inspect_model.py` approves exactly what training takes as `model.base`, and its command survives a shell."""

import argparse
import json
import shutil
import subprocess

import pytest
from cases import case
from script_runs import script
from single_files import narrow_base, write_single_file

from sushi_research import models
from sushi_research.config.command_line import load_config
from sushi_research.errors import UserError
from sushi_research.models import inspection, loading

INTRO = "1\n2\n3\n4\n5"
NAMES = [
    *(
        "plain",
        "my model (v2)",
        "[a].safetensors",
        "it's",
        '"quoted"',
        "$HOME",
        "`id`",
        "a;b&c|d",
        "back\\slash",
        "*?{a,b}",
    ),
    *(
        "two  spaces",
        " ends ",
        "line\nbreak",
        "tab\there",
        "\x1b[31mred",
        "-x",
        "--x",
        "--",
        "null",
        "1e5",
        "true",
        "#x",
        "!x",
    ),
    *("#x", "!x", "a=b", "--a b=c", "海苔", "x: y", "%s"),
]


def test_its_command_can_be_pasted_for_any_path():
    """bash splits each command, and the command line of the script reads the words."""
    for name in NAMES:
        with case(repr(name)):
            command = inspection._command("sdxl", name, "fp16")
            shown = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True).stdout
            launch, start, path, *words = shown.decode().split("\0")[:-1]
            assert (launch, start, path) == ("accelerate", "launch", "scripts/train_sdxl_lora.py")
            config = load_config(models.config_classes()["sdxl"], words, script=path, intro=INTRO)
            assert (config.model.base, config.model.variant, config.data.path) == (name, "fp16", "photos")


def inspect(path, capsys) -> tuple[str, str | None]:
    """(what it prints, its refusal)."""
    try:
        assert script("inspect_model").main(argparse.Namespace(model=str(path))) == 0
        refusal = None
    except UserError as error:
        refusal = str(error)
    return capsys.readouterr().out, refusal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return narrow_base(tmp_path_factory.mktemp("narrow") / "base", "sd15")


def test_the_command_is_on_one_line_as_it_is(folder, tmp_path, capsys):
    base = tmp_path / ("a  very " * 12 + "long [name]")
    base.symlink_to(folder)
    printed, refusal = inspect(base, capsys)
    assert refusal is None and f"--model.base '{base}' --data.path photos\n" in printed


UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
BROKEN = {
    "a git-lfs pointer": lambda base: (base / UNET).write_text("version https://git-lfs.github.com/spec/v1\nsize 1\n"),
    "pickles only": lambda base: (base / TEXT).rename(base / "text_encoder/pytorch_model.bin"),
    "an empty file": lambda base: (base / UNET).write_bytes(b""),
    "a file that is cut": lambda base: (base / UNET).write_bytes((base / UNET).read_bytes()[:-100]),
    "no tokenizer": lambda base: shutil.rmtree(base / "tokenizer"),
    "no merges": lambda base: [
        file.unlink() for file in (base / "tokenizer").glob("[mt]*") if "config" not in file.name
    ],
    "no VAE": lambda base: shutil.rmtree(base / "vae"),
    "no scheduler": lambda base: shutil.rmtree(base / "scheduler"),
    "a flow with a shift that depends on the size": lambda base: (base / "scheduler/scheduler_config.json").write_text(
        json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True})
    ),
}


def test_a_folder_is_refused_as_training_refuses_it(folder, tmp_path, capsys):
    for what, spoil in BROKEN.items():
        with case(what):
            base = shutil.copytree(folder, tmp_path / what)
            spoil(base)
            printed, refusal = inspect(base, capsys)
            with pytest.raises(UserError) as caught:
                loading.resolve_base(str(base)).require_loadable()
            assert refusal == str(caught.value) and inspection.COMMAND not in printed


def test_a_file_that_is_no_base_by_itself_is_refused(folder, tmp_path, capsys):
    parts = ("unet", "vae", "text_encoder")
    for what, options, words in (
        ("whole", {}, None),
        ("no VAE", {"without": ["vae"]}, "without its VAE: give --model.vae"),
        ("VAE", {"without": [name for name in parts if name != "vae"], "companions": False}, "is a VAE alone"),
        ("edm", {"metadata": {"modelspec.prediction_type": "edm"}}, "predicts edm"),
        ("sd3", {"metadata": {"modelspec.prediction_type": "sd3"}}, None),
        ("noob RF", {"metadata": {"modelspec.prediction_type": "epsilon"}}, "is like that of a rectified flow, but "),
    ):
        with case(what):
            file = write_single_file(folder, tmp_path / f"{what}.safetensors", "sd15", **options)
            printed, refusal = inspect(file, capsys)
            assert "sha256" in printed, "what can be said is said"
            assert (inspection.COMMAND in printed) == (words is None)
            assert refusal is None if words is None else words in refusal
