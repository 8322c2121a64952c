"""Layers, overrides, help, and the sentence for every mistake."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from sushi_research.config import SD15Training, SDXLTraining
from sushi_research.config.command_line import NEVER_STORED, config_to_dict, config_to_yaml, load_config
from sushi_research.config.other_scripts import SamplingConfig
from sushi_research.config.process import read_command_line, run_main
from sushi_research.config.prompts import Prompt
from sushi_research.config.sets import sets_of
from sushi_research.config.yaml12 import read_yaml
from sushi_research.errors import UserError
from sushi_research.models import config_classes

ROOT = Path(__file__).parents[3]
SCRIPT = "scripts/train_sdxl_lora.py"
INTRO = "Train a LoRA.\nOne.\nTwo.\nThree.\nFour."
REQUIRED = ["--model.base", "base", "--data.path", "photos", "--train.steps", "10"]
CONCEPTS = sorted((ROOT / "configs" / "demo").glob("*.yaml"))
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
CLASSES = config_classes()
OVERLAYS = sorted((ROOT / "configs" / "overlays").glob("*.yaml"))


def load(*argv: str, config_class: type = SDXLTraining) -> Any:
    return load_config(config_class, argv, script=SCRIPT, intro=INTRO)


def problem(*argv: str, config_class: type = SDXLTraining) -> str:
    """The sentence that a command line is refused with."""
    try:
        load(*argv, config_class=config_class)
    except UserError as error:
        return str(error)
    raise AssertionError(f"accepted: {shlex.join(argv)}")


def run_script(main: Any, config_class: type, argv: Any = None) -> None:
    """What a script does, from its first line to its last."""
    run_main(main, read_command_line(config_class, script=SCRIPT, intro=INTRO, argv=argv))


@pytest.fixture
def layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a YAML file into an empty current folder and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, name: str = "a.yaml") -> str:
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return write


# --- layers and overrides ---


def test_later_layers_win_and_overrides_win_over_all(layer: Any) -> None:
    first = layer("lora: {rank: 1, alpha: 1.0, dropout: 0.1}\noptimizer: {kwargs: {eps: 1.0e-6, betas: [0.8, 0.9]}}\n")
    second = layer("lora: {rank: 2, alpha: 2.0}\noptimizer: {kwargs: {betas: [0.5]}}\n", "b.yaml")
    # The place of an override among the files makes no difference.
    config = load("--lora.rank", "3", "--config", first, f"--config={second}", *REQUIRED)
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (3, 2.0, 0.1)
    assert config.optimizer.kwargs == {"eps": 1e-6, "betas": [0.5]}, "mappings merge, lists replace"
    assert load("--config", second, "--config", first, *REQUIRED).lora.rank == 1
    assert load(*REQUIRED).lora.rank == 16


OVERRIDES: list[tuple[list[str], str, str, Any]] = [
    (["--lora.rank", "32"], "lora", "rank", 32),
    (["--lora.rank=32"], "lora", "rank", 32),
    (["--optimizer.lr", "1e-5"], "optimizer", "lr", 1e-5),
    (["--optimizer.lr=2E-5"], "optimizer", "lr", 2e-5),
    (["--lora.alpha", "8"], "lora", "alpha", 8.0),
    (["--train.max_grad_norm", "null"], "train", "max_grad_norm", None),
    (["--train.gradient_checkpointing", "true"], "train", "gradient_checkpointing", "all"),
    (["--lora.targets", "[to_q, to_k]"], "lora", "targets", ["to_q", "to_k"]),
    (["--lora.targets", "kohya"], "lora", "targets", "kohya"),
    (["--schedule.warmup", "0.05", "--schedule.name", "linear"], "schedule", "warmup", 0.05),
    (["--schedule.warmup", "5", "--schedule.name", "linear"], "schedule", "warmup", 5),
    (["--tracking.wandb", "off"], "tracking", "wandb", "off"),
    (["--optimizer.kwargs.eps", "1e-8"], "optimizer", "kwargs", {"eps": 1e-8}),
    (["--optimizer.kwargs", "{eps: 1e-8, k: on}"], "optimizer", "kwargs", {"eps": 1e-8, "k": "on"}),
    # A key that holds text takes it as it stands, whatever YAML would make of it.
    (["--run.name", "2024-01-31"], "run", "name", "2024-01-31"),
    (["--run.name", "1e5"], "run", "name", "1e5"),
    (["--model.revision", "462165"], "model", "revision", "462165"),
    (["--model.revision", "null"], "model", "revision", None),
    (["--sample.negative_prompt", "null"], "sample", "negative_prompt", "null"),
    (["--sample.negative_prompt", "blurry: [low], #1"], "sample", "negative_prompt", "blurry: [low], #1"),
    (["--sample.negative_prompt", ""], "sample", "negative_prompt", ""),
    (["--sample.negative_prompt=--a=b"], "sample", "negative_prompt", "--a=b"),
    (["--sample.every", "1 epoch"], "sample", "every", "1 epoch"),
    (["--checkpoint.every", "500 steps"], "checkpoint", "every", 500),
    (["--sample.prompts", "['a: b', c]"], "sample", "prompts", ["a: b", "c"]),
    # For a list, what is none is a list of one: a text as it stands, or a number.
    (["--sample.prompts", "mrwhiskers, 1cat"], "sample", "prompts", ["mrwhiskers, 1cat"]),
    (["--sample.prompts", "a: b, {c} # [d]"], "sample", "prompts", ["a: b, {c} # [d]"]),
    (["--sample.prompts", "2"], "sample", "prompts", ["2"]),
    (["--sample.prompts", "[]"], "sample", "prompts", []),
    (["--sample.prompts", "{prompt: a cat, seed: 3}"], "sample", "prompts", [Prompt(prompt="a cat", seed=3)]),
    (["--sample.seeds", "3"], "sample", "seeds", [3]),
    (["--evaluation.drift_captions", "null"], "evaluation", "drift_captions", None),
    (["--sample.prompts", '["null"]'], "sample", "prompts", ["null"]),
    (["--evaluation.drift_captions", "a cat", "--evaluation.path", "x"], "evaluation", "drift_captions", ["a cat"]),
]


def test_an_override_gives_its_value() -> None:
    for override, section, key, value in OVERRIDES:
        taken = getattr(getattr(load(*REQUIRED, *override), section), key)
        assert (taken, type(taken)) == (value, type(value)), override


def test_of_steps_and_epochs_the_later_layer_wins(layer: Any) -> None:
    steps, epochs = layer("train: {steps: 9}"), layer("train: {epochs: 3}", "b.yaml")

    def length(*arguments: str) -> tuple[int | None, int | None]:
        train = load(*REQUIRED[:4], *arguments).train
        return train.steps, train.epochs

    assert length("--config", steps, "--train.epochs", "2") == (None, 2)
    assert length("--config", epochs, "--train.steps", "7") == (7, None)
    assert length("--config", steps, "--config", epochs) == (None, 3)
    assert length("--config", epochs, "--config", steps) == (9, None)
    prompts = layer("sample: {prompts: [a]}", "p.yaml")
    assert load("--config", prompts, *REQUIRED, "--sample.prompts_file", "p.txt").sample.prompts == []
    # Null gives no length: the earlier one stays.
    assert length("--config", steps, "--train.epochs", "null") == (9, None)
    assert problem("--config", layer("train: {epochs: 3, steps: 4}", "c.yaml"), *REQUIRED[:4]) == (
        "train.steps (in c.yaml) and train.epochs (in c.yaml) are both set: keep one and set the other to null"
    )


def test_dry_run_is_a_flag() -> None:
    for words in ("--dry-run", "--dry_run", "--dry_run=true", "--dry-run=true", "--dry_run true", "--dry-run True"):
        assert load(*REQUIRED, *words.split(), "--lora.rank", "8").dry_run is True, words
        assert load(*words.split(), *REQUIRED).dry_run is load(*REQUIRED, *words.split()).dry_run is True, words
    for words in ("", "--dry-run=false", "--dry_run false"):
        assert load(*REQUIRED, *words.split()).dry_run is False, words


def test_dry_run_may_stand_in_a_file(layer: Any) -> None:
    assert load("--config", layer("dry_run: true"), *REQUIRED).dry_run is True


def test_null_takes_an_entry_of_a_free_mapping_away(layer: Any) -> None:
    first = layer("optimizer: {kwargs: {eps: 1.0e-6, weight_decay: 0.1}}")
    second = layer("optimizer: {kwargs: {eps: null, momentum: 0.9}}", "b.yaml")
    both = ["--config", first, "--config", second, *REQUIRED]
    assert load(*both).optimizer.kwargs == {"weight_decay": 0.1, "momentum": 0.9}
    assert load(*both, "--optimizer.kwargs.momentum", "null").optimizer.kwargs == {"weight_decay": 0.1}
    assert load(*both, "--optimizer.kwargs", "null", "--optimizer.kwargs.k", "1").optimizer.kwargs == {"k": 1}


def test_an_empty_file_and_an_empty_section_set_nothing(layer: Any) -> None:
    assert read_yaml(layer("")) == read_yaml(layer("# nothing\n")) == read_yaml(layer("---\n")) == {}
    assert load("--config", layer("lora:\n  # rank: 8\ntrain: {}\n"), *REQUIRED) == load(*REQUIRED)


# --- the YAML dialect ---


SCALARS = [
    ("1e-4", 1e-4),
    ("1e-8", 1e-8),
    ("-1E+3", -1e3),
    ("1.5e3", 1500.0),
    (".5", 0.5),
    ("1.", 1.0),
    ("12", 12),
    ("-3", -3),
    ("0", 0),
    ("007", "007"),
    ("08", "08"),
    ("1_000", "1_000"),
    ("1:30", "1:30"),
    ("0x10", "0x10"),
    ("2024-01-31", "2024-01-31"),
    ("e5", "e5"),
    ("1e", "1e"),
    (".", "."),
    ("=", "="),
    ("on", "on"),
    ("no", "no"),
    ("true", True),
    ("False", False),
    ("null", None),
    ("~", None),
    ("", None),
    ("'1e-4'", "1e-4"),
    (".inf", float("inf")),
]


def test_scalars_are_read_as_they_look(layer: Any) -> None:
    for text, value in SCALARS:
        read = read_yaml(layer(f"a: {text}\n"))["a"]
        assert (read, type(read)) == (value, type(value)), text


def test_anchors_and_merge_keys_work_and_are_no_duplicates(layer: Any) -> None:
    assert read_yaml(layer("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n"))["b"] == {"x": 1, "y": 3}


def test_a_byte_order_mark_and_other_scripts_are_read(layer: Any) -> None:
    text = b"\xef\xbb\xbfsample: {prompts: [\xe5\xaf\xbf\xe5\x8f\xb8]}"
    assert read_yaml(layer(text)) == {"sample": {"prompts": ["\u5bff\u53f8"]}}


BAD_LAYERS: list[tuple[str | bytes, str]] = [
    ("lora:\n  rank: 1\n  alpha: 2\n  rank: 3\n", ", line 4: lora.rank is already on line 2: keep one"),
    ("lora: {}\nlora: {}\n", ", line 2: lora is already on line 1: keep one"),
    ("a:\n- {b: 1, b: 2}\n", ", line 2: a.b is already on line 2: keep one"),
    ("a: &a {b: *a, c: 1}", ", line 1, column 4: not valid YAML: with its aliases it is nested more than 100 deep"),
    (
        "a: 1\na: 2\nb: 1\nb: 2\n",
        ", line 2: a is already on line 1: keep one\na.yaml, line 4: b is already on line 3: keep one",
    ),
    (
        "lora:\n  rank: 1\n bad: 2\n",
        ", line 3, column 2: not valid YAML: expected <block end>, but found '<block mapping start>'",
    ),
    (
        "lora:\n\trank: 1\n",
        ", line 2, column 1: not valid YAML: found character '\\t' that cannot start any token",
    ),
    (
        "a: !!python/name:os.system x\n",
        ", line 1, column 4: not valid YAML: could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/name:os.system'",
    ),
    ("a: !!int x\n", ', line 1, column 4: not valid YAML: "x" cannot be read as int'),
    ("a: 1\n---\nb: 2\n", ", line 2, column 1: not valid YAML: but found another document"),
    ("- 1\n- 2\n", " holds [1, 2]: a config file is a mapping such as lora: {rank: 8}"),
    ("rank", ' holds "rank": a config file is a mapping such as lora: {rank: 8}'),
    (b"lora:\n  rank: \xe9\n", " is not UTF-8 text (byte 14): save it as UTF-8"),
]


def test_a_file_that_is_no_good_layer_is_refused(layer: Any) -> None:
    for text, sentence in BAD_LAYERS:
        assert problem("--config", layer(text), *REQUIRED) == f"a.yaml{sentence}", text


def test_a_control_character_in_a_file_is_refused(layer: Any) -> None:
    assert problem("--config", layer(b"a: \x00")).startswith("a.yaml: not valid YAML: ")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    missing = f"{tmp_path}/no.yaml"
    assert problem("--config", missing) == f"{missing} does not exist: check the path"
    assert problem("--config", str(tmp_path)) == f"{tmp_path} is a folder: --config takes a YAML file"


# --- mistakes ---


# One case per paragraph: the words of the command line, then the sentence, which may go on over several lines.
COMMAND_LINE_MISTAKES = """
--lora.ran 8
unknown key lora.ran on the command line: did you mean --lora.rank?

--lora.ran=8
unknown key lora.ran on the command line: did you mean --lora.rank?

--lora.ran
unknown key lora.ran on the command line: did you mean --lora.rank?

--rank 8
unknown key rank on the command line: diffusers' --rank is --lora.rank here
(16 by default, 4 there; lora.alpha is not the rank by itself: give both)

--ranks 8
unknown key ranks on the command line: did you mean --lora.rank or --text_encoders.rank?

--lora_ranks 8
unknown key lora_ranks on the command line: did you mean --lora.rank?

--loraa.rank 8
unknown key loraa.rank on the command line: did you mean --lora.rank or --text_encoders.rank?

--train.batch-size 8
unknown key train.batch-size on the command line: did you mean --train.batch_size?

--train_batch_size 8
unknown key train_batch_size on the command line: kohya's and diffusers' --train_batch_size is --train.batch_size here (per device)

--train_batch_sizes 8
unknown key train_batch_sizes on the command line: did you mean --train.batch_size?

--steps 8
unknown key steps on the command line: did you mean --train.steps or --sample.steps?

--sample.stepss 8
unknown key sample.stepss on the command line: did you mean --sample.steps?

--data.sets[0].crop none
unknown key data.sets[0].crop on the command line: data.sets is set as a whole, in a config file or as --data.sets '[...]'

--learning_rate 8
unknown key learning_rate on the command line: kohya's, OneTrainer's and diffusers' --learning_rate is --optimizer.lr here

--train.learning-rate 8
unknown key train.learning-rate on the command line: did you mean --optimizer.lr?

--confg a.yaml
unknown key confg on the command line: did you mean --config?

--dryrun
unknown key dryrun on the command line: did you mean --dry_run?

--model.clip_skip 2
unknown key model.clip_skip on the command line: kohya's and diffusers' --clip_skip is not an option here:
SD1.5 only; SDXL is always conditioned as it was trained, as in kohya's scripts

--model.xyzzy 2
unknown key model.xyzzy on the command line: the keys of model are
base, revision, variant, vae, vae_revision, text_encoders, tokenizers, prediction_type, zero_terminal_snr,
flow_shift, base_storage, text_encoder_1_layer

--xyzzy 8
unknown key xyzzy on the command line: the sections are model, data, captions, masks, cache, lora, text_encoders,
train, optimizer, schedule, loss, timesteps, ema, checkpoint, sample, evaluation, tracking, run (--help lists every key)

--optimizer.kwargs.a.b 5
unknown key optimizer.kwargs.a.b on the command line: the keys of optimizer are name, lr, lora_plus_ratio, kwargs

--lora.rank 8 --lora.rank=8
lora.rank is given twice on the command line: keep one

--dry-run --dry_run=false
dry_run is given twice on the command line: keep one

--optimizer.kwargs.eps 1 --optimizer.kwargs '{eps: 2}'
optimizer.kwargs.eps is given twice on the command line: keep one

--lora.rank
--lora.rank needs a value: --lora.rank=VALUE

--data.upscale --lora.rank 8
--data.upscale needs a value: --data.upscale=VALUE

--config
--config needs a value: --config=VALUE

rank=8
unexpected word "rank=8" on the command line: a setting is written --section.key value, and a value of several words in quotes

--
unexpected word "--" on the command line: a setting is written --section.key value

-lora.rank
unexpected word "-lora.rank" on the command line: a setting is written --section.key value

--dry-run yes
dry_run is "yes" on the command line: must be true or false

--dry_run=
dry_run is "" on the command line: must be true or false

--print_config true
--print_config takes no value, and "true" follows it on the command line: remove that

--print-config=false
--print-config takes no value, and "false" follows it on the command line: remove that

--help=true
--help takes no value, and "true" follows it on the command line: remove that

--lora.dora true
unknown key lora.dora on the command line: the keys of lora are start_from, kind, targets, rank, alpha,
conv_rank, conv_alpha, overrides, rank_stabilized, lokr_factor, dropout, rank_dropout, module_dropout, max_norm,
init, save_dtype, metadata, trigger_words, author, description

--lora.kind locon
lora.kind is "locon" on the command line: must be lora, dora, loha, lokr or null

--lora 8
lora is 8 on the command line: it is a section, with the keys start_from, kind, targets, rank, alpha,
conv_rank, conv_alpha, overrides, rank_stabilized, lokr_factor, dropout, rank_dropout, module_dropout, max_norm,
init, save_dtype, metadata, trigger_words, author, description

--lora null
lora is null on the command line: it is a section, with the keys start_from, kind, targets, rank, alpha,
conv_rank, conv_alpha, overrides, rank_stabilized, lokr_factor, dropout, rank_dropout, module_dropout, max_norm,
init, save_dtype, metadata, trigger_words, author, description

--lora.targets [to_q
--lora.targets "[to_q", line 1, column 6: not valid YAML: expected ',' or ']', but got '<stream end>'

--optimizer.kwargs '{a: 1, a: 2}'
--optimizer.kwargs "{a: 1, a: 2}", line 1: a is already on line 1: keep one

--optimizer.kwargs 5
optimizer.kwargs is 5 on the command line: must be a mapping, each entry
an argument name with a number, text, true, false or a list of these

--optimizer.kwargs.a '{b: 5}'
optimizer.kwargs.a is {"b": 5} on the command line: must be
an argument name with a number, text, true, false or a list of these

--lora.rank 0
lora.rank is 0 on the command line: must be a whole number (at least 1, at most 4096) or null

--lora.rank many
lora.rank is "many" on the command line: must be a whole number (at least 1, at most 4096) or null

--lora.rank ''
lora.rank is "" on the command line: must be a whole number (at least 1, at most 4096) or null

--loss.snr_gamma .inf
loss.snr_gamma is Infinity on the command line: must be a number (at least 0.001, at most 10000) or null

--data.flip 1.5
data.flip is 1.5 on the command line: must be a number (at least 0, at most 1)

--lora.dropout 1
lora.dropout is 1 on the command line: must be a number (at least 0, below 1)

--data.upscale yes
data.upscale is "yes" on the command line: must be true or false

--lora.init pissa
lora.init is "pissa" on the command line: must be default or gaussian

--lora.targets atention
lora.targets is "atention" on the command line: must be attention, attention_ff, kohya, kohya_conv,
a list of name suffixes such as [to_q, to_k], or null

--data.bucket_step 60
data.bucket_step is 60 on the command line: must be a whole number (at least 8, at most 1024, a multiple of 8)

--model.variant fp32
model.variant is "fp32" on the command line: must be fp16 or null

--model.vae ''
model.vae is "" on the command line: must be text (not empty) or null

--sample.seeds []
sample.seeds is [] on the command line: must be a list such as [1, 2], not empty, whose entries are
a whole number (at least 0, below 4294967296)

--sample.prompts '[a, 1]'
sample.prompts is ["a", 1] on the command line: must be a list such as [a, b], whose entries are text, or a mapping with
prompt and any of negative_prompt, seed, width, height, steps, guidance, scale

--sample.seeds 1,2
sample.seeds is "1,2" on the command line: must be a list such as [1, 2], not empty, whose entries are
a whole number (at least 0, below 4294967296)

--lora.trigger_words null
lora.trigger_words is null on the command line: must be a list such as [a, b], whose entries are text (not empty)

--sample.prompts '[best] cat'
--sample.prompts "[best] cat", line 1, column 8: not valid YAML: expected '<document start>', but found '<scalar>';
a text that begins with [ goes into a list, in quotes: '["..."]'

--sample.every '1 epok'
sample.every is "1 epok" on the command line: must be a positive number of steps (500, "500 steps") or of epochs
("1 epoch", "0.5 epochs"), a fraction of the run below 1 (0.1), or null

--schedule.warmup 1.5
schedule.warmup is 1.5 on the command line: must be a number of steps (0, 50, "50 steps") or of epochs ("1 epoch"),
or a fraction of the run below 1 (0.05)

--run.name a/b
run.name is "a/b" on the command line: must be at most 200 letters, digits, '.', '_', '-'
(the first no '.' or '-'), or null

--dry_run=1
dry_run is 1 on the command line: must be true or false

--data.resolution 1000
data.resolution (on the command line) is 1000, not a multiple of data.bucket_step (default), which is 64:
choose 960 or 1024

--model.vae_revision main
model.vae_revision (on the command line) has no effect without model.vae (default): set model.vae, or remove it

--optimizer.kwargs.lr 1
optimizer.kwargs.lr (on the command line) is not for here: set optimizer.lr (default)
"""

FILE_MISTAKES = """
lora: {ran: 8}
unknown key lora.ran in a.yaml: did you mean lora.rank?

rnk: 8
unknown key rnk in a.yaml: did you mean lora.rank or text_encoders.rank?

lor: {rank: 8}
unknown key lor in a.yaml: did you mean lora?

config: b.yaml
unknown key config in a.yaml: the sections are model, data, captions, masks, cache, lora, text_encoders,
train, optimizer, schedule, loss, timesteps, ema, checkpoint, sample, evaluation, tracking, run (--help lists every key)

lora: {8: 8}
unknown key lora.8 in a.yaml: the keys of lora are start_from, kind, targets, rank, alpha,
conv_rank, conv_alpha, overrides, rank_stabilized, lokr_factor, dropout, rank_dropout, module_dropout, max_norm,
init, save_dtype, metadata, trigger_words, author, description

lora.rank: 8
the key lora.rank in a.yaml has a dot: nest it, as in lora: {rank: ...}

optimizer: {kwargs: {a.b: 1}}
optimizer.kwargs has the entry "a.b" in a.yaml, and no entry can have a dot: remove it

lora: 8
lora is 8 in a.yaml: it is a section, with the keys start_from, kind, targets, rank, alpha,
conv_rank, conv_alpha, overrides, rank_stabilized, lokr_factor, dropout, rank_dropout, module_dropout, max_norm,
init, save_dtype, metadata, trigger_words, author, description

lora: {rank: '8'}
lora.rank is "8" in a.yaml: must be a whole number (at least 1, at most 4096) or null

lora: {rank: true}
lora.rank is true in a.yaml: must be a whole number (at least 1, at most 4096) or null

lora: {rank: {a: 1}}
lora.rank is {"a": 1} in a.yaml: must be a whole number (at least 1, at most 4096) or null

model: {revision: 1234}
model.revision is 1234 in a.yaml: must be text (not empty) or null; put it in quotes

optimizer: {kwargs: {a-b: 1}}
optimizer.kwargs.a-b is 1 in a.yaml: must be an argument name with a number, text, true, false or a list of these

schedule: {name: linear, warmup: 10}
schedule.warmup (in a.yaml) is 10 steps, but train.steps (on the command line) is 10: the warm-up must end
within the run (a fraction such as 0.05 always does)
"""


def cases(table: str) -> list[tuple[str, str]]:
    """(first line, the rest in one line) of each paragraph."""
    paragraphs = (paragraph.partition("\n") for paragraph in table.strip().split("\n\n"))
    return [(first, " ".join(rest.split("\n"))) for first, _, rest in paragraphs]


def test_a_mistake_on_the_command_line_gets_its_sentence() -> None:
    for words, sentence in cases(COMMAND_LINE_MISTAKES):
        assert problem(*REQUIRED, *shlex.split(words)) == sentence, words


def test_a_mistake_in_a_file_gets_its_sentence(layer: Any) -> None:
    for text, sentence in cases(FILE_MISTAKES):
        assert problem("--config", layer(text), *REQUIRED) == sentence, text


def test_a_value_that_a_later_layer_replaces_is_not_evaluated(layer: Any) -> None:
    assert load("--config", layer("lora: {rank: 0}"), *REQUIRED, "--lora.rank", "4").lora.rank == 4


def test_several_problems_are_listed_one_line_each(layer: Any) -> None:
    words = ["--config", layer("lora: {ran: 8, rank: 0}"), *REQUIRED, "--data.flip", "2", "word"]
    assert problem(*words).splitlines() == [
        "4 problems in the configuration:",
        '  unexpected word "word" on the command line: a setting is written --section.key value, and a value of several words '
        "in quotes",
        "  unknown key lora.ran in a.yaml: did you mean lora.rank?",
        "  data.flip is 2 on the command line: must be a number (at least 0, at most 1)",
        "  lora.rank is 0 in a.yaml: must be a whole number (at least 1, at most 4096) or null",
    ]


def test_missing_keys_are_named_with_the_way_to_give_them() -> None:
    assert problem("--train.steps", "1", "--model.base", "b") == (
        "data.path is missing: give --data.path VALUE, or path under data: in a file "
        "(Training images: a folder with captions next to them, an HF dataset folder, or a hub dataset id)"
    )
    lines = problem("--lora.rank", "8").splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["model.base", "data.path", "train.steps"]


def test_a_long_value_is_cut_in_the_message() -> None:
    assert len(problem(*REQUIRED, "--lora.rank", "x" * 500)) < 200


# --- printing ---


def test_without_arguments_it_says_how_to_begin_in_five_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load()
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"{INTRO}\n"
    with pytest.raises(AssertionError):
        load_config(SDXLTraining, [], script=SCRIPT, intro="Only one line.")


@pytest.mark.parametrize(("flag", "width"), [("--help", 40), ("-h", 72), ("--help", 300)])
def test_help_lists_every_key_within_the_width(
    flag: str, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as caught:
        load("--lora.ran", "8", flag)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= min(max(width, 50), 120)
    shown = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    config = config_to_dict(load(*REQUIRED))
    keys = [f"--{section}.{key}" for section, values in config.items() if isinstance(values, dict) for key in values]
    assert [key for key in shown if key[2:] not in NEVER_STORED] == [
        "--config", "--print_config", "--help", "--dry_run", *keys
    ]  # fmt: skip
    if width == 300:
        assert (
            "  --lora.rank  a whole number (at least 1, at most 4096) or null; default: 16\n      Rank of the" in text
        )
        assert "  --model.base  text (not empty); required\n" in text
        assert "\nlora: The adapter.\n  --lora.start_from  " in text


def test_the_printed_config_loads_to_an_equal_one(layer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*REQUIRED, "--optimizer.kwargs", "{eps: 1e-8, betas: [0.9, 0.999]}", "--run.name", "1e5", "--dry-run"]
    config = load(*words)
    for flag in ("--print_config", "--print-config"):
        with pytest.raises(SystemExit) as caught:
            load(*words, flag)
        assert caught.value.code == 0, flag
        printed = capsys.readouterr().out
        assert printed == config_to_yaml(config), flag
    assert load("--config", layer(printed)) == config
    assert list(yaml.safe_load(printed)) == list(SDXLTraining.model_fields), "the order of the sections is kept"


def test_a_printed_config_without_a_base_loads(layer: Any) -> None:
    """That of sample.py for a run folder, which brings the base: its other keys are null."""
    config = load("--adapters=runs/mycat", "--prompts=a", config_class=SamplingConfig)
    assert load("--config", layer(config_to_yaml(config)), config_class=SamplingConfig) == config
    words = ["--adapters=runs/mycat", "--prompts=a", "--clip_skip=1"]
    assert problem(*words, config_class=SamplingConfig).startswith("clip_skip is set but base is not")


def test_a_prompt_is_printed_as_it_was_written() -> None:
    prompt = f"{'a long prompt, ' * 20}\u5bff\u53f8"
    assert f"  - {prompt}\n" in config_to_yaml(load(*REQUIRED, "--sample.prompts", f"['{prompt}']"))


def test_a_config_with_a_mistake_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert problem(*REQUIRED, "--lora.ran", "8", "--print_config")
    assert capsys.readouterr().out == ""


class Loose(BaseModel):
    """A config whose values are as wild as they come."""

    model_config = ConfigDict(strict=True)
    text: str
    number: float
    entries: dict[str, str] = {}


@settings(max_examples=50)
@given(text=st.text(), number=st.floats(allow_nan=False))
def test_any_text_and_number_survive_the_round_trip(tmp_path_factory: Any, text: str, number: float) -> None:
    config = Loose(text=text, number=number, entries={"a": text})
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(config_to_yaml(config), encoding="utf-8", newline="")
    assert Loose.model_validate(read_yaml(str(path))) == config


def test_text_that_looks_like_something_else_survives_the_round_trip(layer: Any) -> None:
    for text in ("1e-4", "1e5", "off", "null", "2024-01-31", "007", "<<", "", " a ", "a: b", "~", "\x85", "a\nb"):
        read = read_yaml(layer(config_to_yaml(Loose(text=text, number=1e-8))))
        assert read == {"text": text, "number": 1e-8, "entries": {}}, repr(text)


def test_the_dict_is_plain_json_and_the_environment_stays_out(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "sesame-4711")
    monkeypatch.setenv("HF_TOKEN", "sesame-4711")
    monkeypatch.setenv("HOME", "/home/me")
    file = layer("sample: {prompts: ['$HF_TOKEN ${WANDB_API_KEY}']}\nrun: {folder: ~/runs}\n")
    config = load("--config", file, *REQUIRED, "--optimizer.kwargs.betas", "[0.9, 0.99]")
    as_dict = config_to_dict(config)
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert as_dict["lora"]["rank"] == 16 and as_dict["optimizer"]["kwargs"] == {"betas": [0.9, 0.99]}
    assert as_dict["run"]["folder"] == "/home/me/runs"
    assert "sesame" not in config_to_yaml(config) and "sesame" not in json.dumps(as_dict)


# --- running ---


def test_run_script_hands_the_config_to_main() -> None:
    seen = []
    run_script(seen.append, SD15Training, argv=[*REQUIRED, "--lora.rank", "8"])
    assert [config.lora.rank for config in seen] == [8] and isinstance(seen[0], SD15Training)


def test_run_script_reads_the_process_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT, *REQUIRED])
    seen = []
    run_script(seen.append, SD15Training)
    assert seen == [read_command_line(SD15Training, script=SCRIPT, intro=INTRO)]
    assert seen[0].data.path == "photos"


def test_the_status_that_main_returns_ends_the_process() -> None:
    config = load(*REQUIRED)
    run_main(lambda config: 0, config)
    run_main(lambda config: None, config)
    with pytest.raises(SystemExit) as caught:
        run_main(lambda config: 143, config)
    assert caught.value.code == 143


def test_a_user_error_ends_in_status_2_and_ctrl_c_in_130(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> Any:
        def main(config: SDXLTraining) -> None:
            raise error

        return main

    def status(main: Any, *argv: str) -> Any:
        with pytest.raises(SystemExit) as caught:
            run_script(main, SDXLTraining, argv=argv)
        output = capsys.readouterr()
        return caught.value.code, output.out, output.err

    assert status(fail(UserError("no images")), *REQUIRED) == (2, "", "error: no images\n")
    assert status(print, *REQUIRED, "--ranks", "8") == (
        2,
        "",
        "error: unknown key ranks on the command line: did you mean --lora.rank or --text_encoders.rank?\n",
    )
    assert status(fail(KeyboardInterrupt()), *REQUIRED) == (
        130,
        "",
        "SIGINT while working: nothing is kept; the same command again starts over\n",
    )
    with pytest.raises(ZeroDivisionError):
        run_script(lambda config: 1 / 0, SDXLTraining, argv=REQUIRED)


def test_nothing_heavy_is_imported() -> None:
    commands = [[], ["--help"], [*REQUIRED, "--print_config"], REQUIRED, ["--lora.ran", "8"]]
    code = (
        "import sys\n"
        "from sushi_research.config.process import read_command_line, run_main\n"
        "from sushi_research.config import SDXLTraining\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'peft', 'datasets', 'accelerate', 'wandb', 'PIL'}\n"
        f"for words in {commands!r}:\n"
        "    try:\n"
        f"        run_main(lambda config: None, read_command_line(SDXLTraining, script='s', intro={INTRO!r}, argv=words))\n"
        "    except SystemExit:\n"
        "        pass\n"
        "    print('after', words, sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
        "assert 'yaml' in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    after = [line for line in done.stderr.splitlines() if line.startswith("after ")]
    assert (done.returncode, after) == (0, [f"after {words} []" for words in commands]), done.stderr


# --- the files under configs/ ---


def test_every_recipe_loads_alone_and_under_every_overlay() -> None:
    for recipe in RECIPES:
        config_class = CLASSES[recipe.stem.removesuffix("_lora").removeprefix("demo_")]
        for overlay in [None, *OVERLAYS]:
            words = ["--config", str(recipe), *(["--config", str(overlay)] if overlay else [])]
            try:
                load(*words, "--data.path", "photos", config_class=config_class)
            except UserError as error:
                raise AssertionError(f"{recipe.name} under {overlay}") from error


@pytest.mark.parametrize("config_class", [SD15Training, SDXLTraining])
def test_the_demos_concepts_lie_over_both_demos(config_class: type) -> None:
    demo = ROOT / f"configs/demo_{'sdxl' if config_class is SDXLTraining else 'sd15'}.yaml"
    for concept in CONCEPTS:
        config = load("--config", str(demo), "--config", str(concept), config_class=config_class)
        assert (Path(config.data.path).name, len(config.sample.prompts)) == (concept.stem, 6)
    assert len(CONCEPTS) >= 3


def test_the_recipes_and_overlays_say_what_they_are_for() -> None:
    assert {path.stem for path in RECIPES} >= {"sd15_lora", "sdxl_lora"}
    assert {path.stem for path in OVERLAYS} >= {"8gb", "min_snr", "attention_ff", "tags", "subject"}
    for name, config_class in {"sd15_lora": SD15Training, "sdxl_lora": SDXLTraining}.items():
        recipe = ["--config", str(ROOT / f"configs/{name}.yaml"), "--data.path", "photos"]
        plain = load(*recipe, config_class=config_class)
        assert (plain.lora.targets, plain.loss.snr_gamma) == ("attention", None)
        assert plain.lora.alpha == plain.lora.rank == 16
        # The samples of a step on one process are the same in both recipes and in the overlay for small GPUs.
        assert plain.train.batch_size * plain.train.accumulation == 4
        assert plain.optimizer.kwargs == {"betas": [0.9, 0.999], "weight_decay": 0.01, "eps": 1e-8}

        def overlaid(overlay: str, recipe: list[str] = recipe, config_class: type = config_class) -> Any:
            return load(*recipe, "--config", str(ROOT / f"configs/overlays/{overlay}.yaml"), config_class=config_class)

        assert overlaid("attention_ff").lora.targets == "attention_ff"
        assert overlaid("min_snr").loss.snr_gamma == 5.0
        small = overlaid("8gb")
        assert small.train.memory == "8GB" and small.train.batch_size * small.train.accumulation == 4
        assert (small.lora, small.sample, small.optimizer.lr) == (plain.lora, plain.sample, plain.optimizer.lr)
        tags = overlaid("tags").captions
        assert tags.shuffle and tags.keep_tags == 1 and 0 < tags.tag_dropout < 1 and 0 < tags.dropout < 1
        subject = sets_of(
            load(*recipe[:2], "--config", str(ROOT / "configs/overlays/subject.yaml"), config_class=config_class)
        )
        assert [(each.role, each.target, each.masks.source, each.captions.source) for each in subject] == [
            ("train", "image", "files", "files"),
            ("regularisation", "base", "none", "folder"),
        ]
        assert problem(*recipe[:2], config_class=config_class).startswith("data.path is missing")


def test_the_launcher_configs_are_accelerates_own() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    files = {path.stem: load_config_from_file(str(path)) for path in (ROOT / "configs/accelerate").glob("*.yaml")}
    shape = {
        name: (str(file.distributed_type.value), file.use_cpu, file.num_machines, file.num_processes)
        for name, file in files.items()
    }
    assert shape == {
        "cpu": ("NO", True, 1, 1),
        "one_gpu": ("NO", False, 1, 1),
        "multi_gpu": ("MULTI_GPU", False, 1, 2),
        "multi_node": ("MULTI_GPU", False, 2, 16),
    }
    # `no` leaves the precision to the config.
    assert {file.mixed_precision for file in files.values()} == {"no"}


def test_help_may_be_cut_off_by_its_reader() -> None:
    command = f"{sys.executable} {ROOT / SCRIPT} --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("usage: ") and done.stderr == ""
