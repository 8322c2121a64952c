"""A key without effect is refused, unless a later layer has switched off what it is for."""

import pytest

from sushi_research.config import SD15Training, SDXLTraining, effects
from sushi_research.config.command_line import config_to_yaml, load_config
from sushi_research.config.keys import default_values
from sushi_research.config.other_scripts import SamplingConfig, evaluation_config
from sushi_research.errors import UserError

REQUIRED = ["--model.base", "base", "--data.path", "photos", "--train.steps", "10"]
EVALUATION = evaluation_config(SD15Training)


def load(*words, config_class=SD15Training):
    return load_config(config_class, words, script="s", intro="1\n2\n3\n4\n5")


# What makes keys ineffective; a key, its value; and the reason in the sentence.
REFUSED = [
    ("", "model.vae_revision", "main", "without model.vae"),
    ("", "evaluation.split", "test", "without evaluation.path"),
    ("model.prediction_type=epsilon", "model.flow_shift", "3.0", "only rectified_flow has a shift"),
    ("model.prediction_type=rectified_flow", "model.zero_terminal_snr", "true", "which always ends in pure noise"),
    ("schedule.name=range_test", "schedule.warmup", "5", "begins with the smallest rate"),
    ("schedule.name=rex", "schedule.decay", "0.1", "only wsd has a decay of its own length"),
    ("schedule.name=wsd", "schedule.timescale", "9", "only inverse_sqrt has a timescale"),
    ("", "schedule.span", "9.0", "only range_test has a span"),
    ("", "loss.huber_c", "0.2", "because of loss.type"),
    ("loss.type=l1", "loss.huber_schedule", "constant", "because of loss.type"),
    ("loss.weighting=p2", "loss.snr_gamma", "5.0", "only min_snr and soft_min_snr have a gamma"),
    ("loss.weighting=none", "loss.snr_gamma", "5.0", "only min_snr and soft_min_snr have a gamma"),
    ("loss.weighting=min_snr", "loss.p2_k", "2.0", "only p2 uses them"),
    ("", "loss.noise_offset_random", "true", "while loss.noise_offset"),
    ("", "loss.multires_discount", "0.5", "while loss.multires_iterations"),
    ("loss.multires_iterations=1", "loss.multires_discount", "0.5", "while loss.multires_iterations"),
    ("timesteps.distribution=sigmoid", "timesteps.mean", "0.5", "only logit_normal has a mean"),
    ("", "timesteps.std", "2.0", "while timesteps.distribution"),
    ("", "data.crops", "3", r"while data\.crop .*is not random"),
    ("data.crop=random", "data.crop_column", "box", r"while data\.crop .*is not box"),
    ("", "evaluation.every", "7", "because nothing is evaluated"),
    ("", "evaluation.noise_samples", "16", "because nothing is evaluated"),
    ("", "evaluation.drift_captions", "[a]", "because nothing is evaluated"),
    ("", "evaluation.prior_path", "prior", "because nothing is evaluated"),
    ("", "evaluation.pictures", "4", "because nothing is evaluated"),
    ("", "evaluation.keep_best", "true", "because nothing is evaluated"),
    ("", "masks.background", "0.5", "while masks.source"),
    ("masks.source=alpha", "masks.folder", "masks", "because of masks.source"),
    ("masks.source=files", "masks.column", "outline", "because of masks.source"),
    ("sample.enabled=false", "sample.every", "7", "while sample.enabled"),
    ("sample.enabled=false", "sample.prompts", "[a cat]", "while sample.enabled"),
    ("sample.enabled=false", "sample.seeds", "[1]", "while sample.enabled"),
    ("sample.enabled=false", "sample.steps", "7", "while sample.enabled"),
    ("sample.enabled=false", "sample.guidance", "3", "while sample.enabled"),
    ("sample.enabled=false", "sample.width", "64", "while sample.enabled"),
    ("sample.enabled=false", "sample.height", "64", "while sample.enabled"),
    ("sample.enabled=false", "sample.negative_prompt", "blurry", "while sample.enabled"),
    ("sample.prompts=[{prompt: a, seed: 3}]", "sample.seeds", "[4]", "because each of sample.prompts"),
    ("sample.prompts=[{prompt: a, steps: 3}]", "sample.steps", "4", "because each of sample.prompts"),
    ("sample.guidance=1", "sample.negative_prompt", "blurry", "while sample.guidance"),
    ("sample.enabled=false", "sample.prompts_file", "prompts.txt", "while sample.enabled"),
    ("lora.start_from=a.safetensors", "lora.init", "gaussian", "with lora.start_from"),
    ("lora.start_from=a.safetensors", "lora.conv_rank", "4", "with lora.start_from"),
    ("lora.start_from=a.safetensors", "lora.conv_alpha", "4.0", "with lora.start_from"),
    ("lora.start_from=a.safetensors", "lora.rank_stabilized", "true", "with lora.start_from"),
    ("lora.kind=loha", "lora.init", "gaussian", "because of lora.kind"),
    ("lora.kind=dora", "lora.lokr_factor", "4", "because of lora.kind"),
    ("lora.metadata=none", "lora.trigger_words", "[sks]", "while lora.metadata"),
    ("lora.metadata=none", "lora.author", "me", "while lora.metadata"),
    ("lora.metadata=none", "lora.description", "mine", "while lora.metadata"),
    ("schedule.name=constant", "schedule.warmup", "5", "while schedule.name"),
    ("schedule.name=constant", "schedule.warmup", "1 epoch", "while schedule.name"),
    ("schedule.name=cosine", "schedule.cycles", "2", "only cosine_with_restarts has cycles"),
    ("schedule.name=linear", "schedule.power", "2.0", "only polynomial has a power"),
    ("tracking.wandb=off", "tracking.project", "cats", "while tracking.wandb"),
    ("tracking.wandb=off", "tracking.entity", "me", "while tracking.wandb"),
    ("tracking.wandb=off", "tracking.tags", "[a]", "while tracking.wandb"),
]


@pytest.mark.parametrize(("off", "key", "value", "reason"), REFUSED)
def test_a_key_without_effect_is_refused(off, key, value, reason, tmp_path):
    """In one layer, and in a later one; what an earlier layer gives goes back to its default."""
    switch = [f"--{off}"] if off else []
    setting = f"--{key}={value}"
    later = tmp_path / "later.yaml"
    section, _, name = off.partition("=")[0].partition(".")
    later.write_text(f"{section}: {{{name}: {off.partition('=')[2]}}}\n" if off else "{}")
    earlier = tmp_path / "earlier.yaml"
    earlier.write_text("{}: {{{}: {}}}\n".format(*key.split("."), value))
    for words in ([*switch, setting], ["--config", str(later), setting]):
        with pytest.raises(UserError, match=rf"^{key} \(on the command line\) has no effect .*{reason}"):
            load(*REQUIRED, *words)
    if off:
        # The earlier key and the switch, which is later.
        config = load("--config", str(earlier), "--config", str(later), *REQUIRED)
        assert config == load(*REQUIRED, *switch)


def test_what_has_an_effect_is_taken():
    drawn = ["--sample.enabled=false", "--evaluation.pictures=4", "--sample.steps=7", "--sample.negative_prompt=blurry"]
    assert load(*REQUIRED, "--evaluation.held_out=0.2", *drawn).sample.steps == 7
    # evaluate.py evaluates on all images if none are held out.
    assert load(*REQUIRED, *drawn, "--evaluation.noise_samples=16", config_class=EVALUATION).sample.steps == 7
    some = ["--sample.prompts=[{prompt: a, seed: 3}, b]", "--sample.seeds=[4]"]
    assert load(*REQUIRED, *some).sample.seeds == [4]
    given = ["--schedule.name=cosine_with_restarts", "--schedule.cycles=2", "--schedule.warmup=5"]
    assert load(*REQUIRED, *given).schedule.cycles == 2


def test_a_later_layer_switches_off_with_all_that_belongs_to_it(tmp_path):
    """The config of the run has no key without effect, so it reads back as it is."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "sample: {every: 7, prompts: [a], steps: 9, enabled: false}\n"
        "evaluation: {held_out: 0.1, every: 7, pictures: 4}\nschedule: {name: linear, warmup: 0.05}\n"
    )
    with pytest.raises(
        UserError, match=r"^sample.every \(in .*recipe.yaml\) and sample.prompts \(in .*\) have no effect"
    ):
        load("--config", str(recipe), *REQUIRED)
    recipe.write_text(recipe.read_text().replace(", enabled: false", ""))
    off = ["--sample.enabled=false", "--evaluation.held_out=0", "--schedule.name=constant"]
    config = load("--config", str(recipe), *REQUIRED, *off)
    # sample.steps had an effect through evaluation.pictures, which was switched off with the evaluation.
    assert (config.sample.every, config.sample.prompts, config.sample.steps) == (250, [], 25)
    assert (config.evaluation.every, config.evaluation.pictures, config.schedule.warmup) == (250, 0, 0)
    written = tmp_path / "config.yaml"
    written.write_text(config_to_yaml(config))
    assert load("--config", str(written)) == config


def test_the_config_of_an_earlier_version_s_run_is_taken(tmp_path):
    """Its 8 GB overlay switched samples off below the settings of a recipe, and config.yaml has both in one layer."""
    recorded = tmp_path / "config.yaml"
    recorded.write_text("sample: {enabled: false, steps: 9, guidance: 7.0, prompts: [a]}\n")
    with pytest.raises(UserError, match="has no effect"):
        load("--config", str(recorded), *REQUIRED)
    (tmp_path / "run.json").write_text("{}")
    assert load("--config", str(recorded), *REQUIRED) == load(*REQUIRED, "--sample.enabled=false")
    with pytest.raises(UserError, match=r"^sample.steps \(on the command line\) has no effect"):
        load("--config", str(recorded), *REQUIRED, "--sample.steps=7")


def test_the_other_scripts_refuse_too():
    for words, key in (
        (["--lora_scales=0.7"], "lora_scales"),
        (["--prediction_type=v_prediction", "--flow_shift=3"], "flow_shift"),
        (["--guidance=1", "--negative_prompt=blurry"], "negative_prompt"),
    ):
        with pytest.raises(UserError, match=rf"^{key} has no effect"):
            load("--base=base", "--prompts=a", *words, config_class=SamplingConfig)
    with pytest.raises(UserError, match="^lora_scales has no effect"):
        load(*REQUIRED, "--lora_scales=0.7", config_class=EVALUATION)


def test_every_key_of_the_table_is_a_key():
    known = {key for config_class in (SD15Training, SDXLTraining, EVALUATION) for key in default_values(config_class)}
    known |= {"prompts", "data.sets", *default_values(SamplingConfig)}
    rules = (*effects.TRAINING, *effects.SAMPLING, *effects.EVALUATION)
    assert {key for rule in rules for key in (*rule.keys, *rule.when)} <= known


def test_an_override_without_a_setting_is_refused() -> None:
    for entries in ("[{modules: down_blocks.1}]", "[{modules: up, rank: 2}, {modules: down_blocks.1, alpha: null}]"):
        with pytest.raises(
            UserError, match=r"^lora.overrides\[\d\] \(on the command line\) has no effect: give rank, "
        ):
            load(*REQUIRED, "--lora.overrides", entries)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        (
            "lora.overrides",
            "[{module: a, rank: 1}]",
            "unknown key lora.overrides[0].module: did you mean lora.overrides[0].modules? (on the command line)",
        ),
        (
            "text_encoders.lr",
            "[0, 0]",
            "text_encoders.lr is [0, 0] on the command line: must not be 0 for both; "
            "set text_encoders.train false to train neither",
        ),
        (
            "text_encoders.lr",
            "[0, 1e-15]",
            "text_encoders.lr is [0, 1e-15] on the command line: each must be 0 or at least 1e-12",
        ),
    ],
)
def test_one_sentence_for_one_mistake(key, value, sentence):
    with pytest.raises(UserError) as caught:
        load(*REQUIRED, "--text_encoders.train", "true", f"--{key}", value, config_class=SDXLTraining)
    assert str(caught.value) == sentence
