"""find_learning_rate.py, with both trainings in this process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from script_runs import ROOT, Trainer, script

from sushi_research.adapters.tensor_names import NEW_TOKENS
from sushi_research.config import SD15Training, SDXLTraining
from sushi_research.config.command_line import config_to_yaml, load_config
from sushi_research.errors import NotFinite, UserError
from sushi_research.runs.run_folder import RunFolder
from sushi_research.training import run
from sushi_research.training.parameter_groups import Own, groups_of

SCRIPT = script("find_learning_rate")


@pytest.fixture
def launched(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines of the trainings, which run here."""
    found: list[list[str]] = []

    def train(command: object, words: list[str], environment: object, *, has_launcher: bool) -> tuple[int, str]:
        assert not has_launcher  # a signal goes to the script itself, not only to what it has started
        assert words[1] == str(ROOT / "scripts/train_sd15_lora.py")
        found.append(words[2:])
        try:
            return trainer.script.main(load_config(SD15Training, words[2:], script="s", intro="1\n2\n3\n4\n5")), ""
        except UserError as error:
            print(error)
            return 2, str(error)

    monkeypatch.setattr(SCRIPT.RunCommand, "train", train)
    return found


@pytest.mark.parametrize("architecture", ["sd15"])
def test_two_trainings_on_the_same_noise_give_a_picture_and_nothing_else(
    architecture: str,
    trainer: Trainer,
    launched: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    changes = {"schedule.name": "cosine", "schedule.warmup": 1, "train.steps": 3, "sample.enabled": True}
    given = tmp_path / "given.yaml"
    given.write_text(config_to_yaml(trainer.config("given", changes)))
    before = set(trainer.runs.rglob("*"))
    words = ["sd15", "--config", str(given), "--lowest", "1e-3", "--highest", "100", "--steps", "10"]
    test = SCRIPT.read([*words, "--output", str(tmp_path / "new/rates.png")])
    losses: list[dict[int, float]] = []
    curve_of = SCRIPT.rate_range.curve_of
    monkeypatch.setattr(
        SCRIPT.rate_range,
        "curve_of",
        lambda *each, **ended: losses.extend([each[2], each[1]]) or curve_of(*each, **ended),
    )
    assert SCRIPT.main(test) == 0
    printed = capfd.readouterr().out
    assert (tmp_path / "new/rates.png").read_bytes().startswith(b"\x89PNG")
    assert set(trainer.runs.rglob("*")) - before <= {tmp_path / "new", tmp_path / "new/rates.png"}
    assert len(launched) == 2 and "--- 10 steps that learn nothing ---" in printed
    # A rate of 100 gives losses that are not finite, or far above the base's.
    assert "the loss " in printed and f"written: {tmp_path / 'new/rates.png'}" in printed

    # Both begin with the base's loss, and the rate changes that of the second one only.
    base, rising = losses
    assert (
        list(base) == list(range(1, 11))
        and rising[1] == base[1]
        and all(rising[step] != base[step] for step in rising if step > 2)
    )


def test_no_rate_of_its_own_is_left_behind(tmp_path: Path) -> None:
    """A rate that stays as it is would be trained with in the run that learns nothing."""
    own = {"text_encoders.train": "true", "text_encoders.lr": "[5e-4, 0]", "text_encoders.new_tokens_lr": "5e-3"}
    own |= {"run.push_to_hub": "someone/something"}  # nothing is published
    own |= {"text_encoders.new_tokens": "[{token: sks}]", "optimizer.lr": "1e-3", "optimizer.lora_plus_ratio": "16"}
    words = [f"--{key}={value}" for key, value in own.items()]
    test = SCRIPT.read(["sdxl", "--config", str(ROOT / "configs/demo_sdxl.yaml"), "--data.path=photos", *words])
    (tmp_path / "config.yaml").write_text(config_to_yaml(test.config))
    names = ["unet.a.lora_B.weight", "text_encoder.a.lora_A.weight", "text_encoder.new_tokens.sks"]
    for highest, expected in ((SCRIPT.NOTHING, [16, 1, 5]), (0.1, [16, 0.5, 5])):
        words = SCRIPT.command_of(test, tmp_path, "run", SCRIPT.rates_up_to(highest, test.config))[2:]
        config = load_config(SDXLTraining, words, script="s", intro="1\n2\n3\n4\n5")
        assert config.run.push_to_hub is None and config.optimizer.lr == highest and config.text_encoders.lr[1] == 0
        of_run = {"text_encoder": Own(config.text_encoders.lr[0]), NEW_TOKENS: Own(config.text_encoders.new_tokens_lr)}
        rates = [group.rate(highest, 0) for group in groups_of(names, config, of_run)]
        assert rates == pytest.approx([highest * factor for factor in expected])


def test_the_script_is_the_first_word_or_sdxl(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in ([], "This tests a range of learning rates"), (["--help"], "find_learning_rate.py sdxl"):
        with pytest.raises(SystemExit) as ended:
            SCRIPT.read(words)
        assert not ended.value.code and said in capsys.readouterr().out


def test_equal_rates_stay_equal() -> None:
    """Or an optimizer that takes only one rate would be refused as having two."""
    words = ["--config", str(ROOT / "configs/demo_sd15.yaml"), "--data.path=p", "--text_encoders.train=true"]
    for lr in (0.3, 1e-3, 0.7, 3e-5):
        test = SCRIPT.read(["sd15", *words, f"--optimizer.lr={lr}", f"--text_encoders.lr={lr}"])
        for highest in (100.0, 0.1, 0.3, 7.0):
            assert set(SCRIPT.rates_up_to(highest, test.config).values()) == {highest}, (lr, highest)


@pytest.mark.parametrize("is_noted", [True, False])
def test_only_a_loss_that_is_not_finite_ends_the_curve(
    is_noted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rising run that dies of anything else, such as a full disk, has failed."""
    folder = RunFolder(tmp_path / "rising", None)
    job = SimpleNamespace(is_main=True, run=folder, config=SimpleNamespace(schedule=SimpleNamespace(name="range_test")))

    def train(*words: object, **options: object) -> tuple[int, str]:
        folder.path.mkdir()
        folder.metrics.write_text('{"step": 1, "time": 1.0, "loss": 0.5}\n')
        error = (NotFinite if is_noted else UserError)("the disk is full, or the loss is not finite")
        with pytest.raises(type(error)), run.noted(job):
            raise error
        return 2, ""

    monkeypatch.setattr(SCRIPT.RunCommand, "train", train)
    monkeypatch.setattr(SCRIPT, "command_of", lambda *given: [])
    if is_noted:
        assert SCRIPT.losses_of(SCRIPT.train(None, tmp_path, "rising", {}, {1: 0.5})) == {1: 0.5}
        with run.noted(job):  # the next command's
            assert not folder.not_finite.exists()
        return
    with pytest.raises(UserError, match="the training failed, and says above why"):
        SCRIPT.train(None, tmp_path, "rising", {}, {1: 0.5})


@pytest.mark.parametrize("architecture", ["sd15"])
def test_mistakes(
    architecture: str, trainer: Trainer, launched: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = str(ROOT / "configs/demo_sd15.yaml")
    for words, sentence in [
        (["sd15", "--lowest", "1", "--highest", "0.1"], "--lowest 1 --highest 0.1 is no range of learning rates"),
        (["sd15", "--highest", "1e-13"], "--highest is 1e-13: give a learning rate from 1e-12 to 1000"),
        (["sd15", "--highest", "2000"], "--highest is 2000: give a learning rate from 1e-12 to 1000"),
        (["sd15", "--lowest", "nan"], "--lowest is nan: give a learning rate from 1e-12 to 1000"),
        (
            [
                *"sd15 --highest 900 --data.path=p --text_encoders.train=true --text_encoders.lr=2e-3 --config".split(),
                demo,
            ],
            "text_encoders.lr would rise to 1200 with --highest 900, as it keeps its ratio to optimizer.lr, and 1000 is",
        ),
        (
            ["--config", demo, "--steps", "20"],
            "--config comes before the training script: begin with sd15, sdxl or my_script.py",
        ),
        (["--steps", "20", "sd15", "--config", demo], "--steps comes before the training script: begin with"),
        (["sd15", "--steps", "2"], "--steps is 2: give 10 to 10000"),
        (
            ["sd15", "--config", demo, "--dry-run"],
            "--dry-run has no effect on a range test",
        ),
        (["sd15", "--output", str(tmp_path)], f"--output {tmp_path} is a folder: give the file"),
        (["sd16"], "script is sd16, which is not a file: give the path of a training script"),
    ]:
        with pytest.raises(SystemExit):
            SCRIPT.read(words)
        assert sentence in capsys.readouterr().err
    given = tmp_path / "given.yaml"
    given.write_text(config_to_yaml(trainer.config("given", {"lora.targets": ["nothing"]})))
    test = SCRIPT.read(["sd15", "--config", str(given), "--output", str(tmp_path / "rates.png")])
    with pytest.raises(UserError, match="optimizer.lr"):  # of the second run, before the first
        SCRIPT.main(test._replace(highest=2000.0))
    assert not launched
    with pytest.raises(UserError, match="the training failed, and says above why"):
        SCRIPT.main(test)
    assert not (tmp_path / "rates.png").exists() and len(launched) == 1
