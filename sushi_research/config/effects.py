"""Keys that have no effect while another key has a certain value, in one table.

A config that gives such a key a value of its own is refused (`require_effect`), because whoever gave it expects an effect. But a
later layer may switch off what an earlier one has set: with a recipe's `sample.every: 250` and `--sample.enabled false` the former
goes back to its default (`drop_earlier`). So the config.yaml of a run never has such a key, and reads back as an equal config.
That of an earlier version may have some, so that those of a run folder always go back to their defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from sushi_research.config.keys import default_values
from sushi_research.config.mistakes import Setting


class Rule(NamedTuple):
    """While each key in `when` has a value that passes its test, `keys` have no effect. A key that a config lacks has None.

    `because` and `remedy` complete the sentence "lora.rank has no effect BECAUSE: REMEDY, or remove it".
    """

    keys: tuple[str, ...]
    when: Mapping[str, Callable[[Any], bool]]
    because: str
    remedy: str


# Settings of the section that a prompt can have itself.
_OF_PROMPTS = ("steps", "guidance", "width", "height", "negative_prompt")


def _is(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


def _is_other_than(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value not in values


def _each_has(name: str) -> Callable[[Any], bool]:
    """Whether there are prompts and each is a mapping with this setting."""
    return lambda prompts: bool(
        isinstance(prompts, list)
        and prompts
        and all(isinstance(prompt, dict) and prompt.get(name) is not None for prompt in prompts)
    )


def _own_settings(section: str, otherwise: Mapping[str, Callable[[Any], bool]]) -> tuple[Rule, ...]:
    """Settings that each prompt has itself; `otherwise` tests that they are not used without prompts."""
    ruled = {"seeds": ("seed", {})} | {name: (name, otherwise) for name in _OF_PROMPTS}
    return tuple(
        Rule(
            (f"{section}{key}",),
            {f"{section}prompts": _each_has(own), **tests},
            f"because each of {section}prompts has a {own} of its own",
            "take it out there",
        )
        for key, (own, tests) in ruled.items()
    )


def _of_prediction(section: str) -> tuple[Rule, ...]:
    """The settings of a noise schedule that belongs to other prediction types."""
    return (
        Rule(
            (f"{section}zero_terminal_snr",),
            {f"{section}prediction_type": _is("rectified_flow")},
            f"while {section}prediction_type is rectified_flow, which always ends in pure noise",
            "choose another",
        ),
        Rule(
            (f"{section}flow_shift",),
            {f"{section}prediction_type": _is("epsilon", "v_prediction")},
            f"because of {section}prediction_type: only rectified_flow has a shift",
            "choose that",
        ),
    )


def _has_only_texts(prompts: Any) -> bool:
    return isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)


# What holds for evaluate.py too. A rule may rely on what an earlier one has dropped.
EVERYWHERE = (
    *_of_prediction("model."),
    Rule(
        ("model.vae_revision",),
        {"model.vae": _is(None)},
        "without model.vae",
        "set model.vae",
    ),
    Rule(
        ("evaluation.split",),
        {"evaluation.path": _is(None)},
        "without evaluation.path",
        "set evaluation.path",
    ),
    Rule(
        ("sample.every", "sample.prompts", "sample.prompts_file", "sample.seeds"),
        {"sample.enabled": _is(False)},
        "while sample.enabled is false",
        "set it to true",
    ),
    Rule(
        tuple(f"sample.{name}" for name in _OF_PROMPTS),
        {"sample.enabled": _is(False), "evaluation.pictures": _is(0)},
        "while sample.enabled is false and evaluation.pictures is 0",
        "set one of them",
    ),
    Rule(
        ("sample.negative_prompt",),
        {"sample.guidance": _is(1), "sample.prompts": _has_only_texts, "sample.prompts_file": _is(None)},
        "while sample.guidance is 1, which is none",
        "set another guidance",
    ),
    *_own_settings("sample.", {"evaluation.pictures": _is(0)}),
)
TRAINING = (
    # As with masks below: a set may be cropped in its own way.
    Rule(
        ("data.crops",),
        {"data.crop": _is_other_than("random"), "data.sets": _is(None, [])},
        "while data.crop is not random",
        "set it to that",
    ),
    Rule(
        ("data.crop_column",),
        {"data.crop": _is_other_than("box"), "data.sets": _is(None, [])},
        "while data.crop is not box",
        "set it to that",
    ),
    # With several sets, a set may have masks of its own, and takes what it does not give from here.
    Rule(
        ("masks.background", "masks.unmasked", "masks.invert"),
        {"masks.source": _is("none"), "data.sets": _is(None, [])},
        "while masks.source is none",
        "say where the masks are",
    ),
    Rule(
        ("masks.folder",),
        {"masks.source": _is_other_than("files"), "data.sets": _is(None, [])},
        "because of masks.source",
        "set that to files",
    ),
    Rule(
        ("masks.column",),
        {"masks.source": _is_other_than("column"), "data.sets": _is(None, [])},
        "because of masks.source",
        "set that to column",
    ),
    Rule(
        tuple(
            f"evaluation.{name}"
            for name in ("every", "noise_samples", "drift_captions", "prior_path", "pictures", "keep_best")
        ),
        {"evaluation.held_out": _is(0), "evaluation.path": _is(None)},
        "because nothing is evaluated: evaluation.held_out is 0 and evaluation.path is null",
        "set one of these two",
    ),
    *EVERYWHERE,
    Rule(
        tuple(f"text_encoders.{name}" for name in ("targets", "rank", "alpha", "lr")),
        {"text_encoders.train": _is(False)},
        "while text_encoders.train is false",
        "set it to true",
    ),
    Rule(
        ("text_encoders.until",),
        {"text_encoders.train": _is(False), "text_encoders.new_tokens": _is([])},
        "while text_encoders.train is false",
        "set it to true",
    ),
    Rule(
        ("text_encoders.new_tokens_lr",),
        {"text_encoders.new_tokens": _is([])},
        "without text_encoders.new_tokens",
        "give some",
    ),
    Rule(
        ("captions.encode", "captions.variants"),
        {"text_encoders.new_tokens": _is_other_than([])},
        "with text_encoders.new_tokens, where the text encoders encode each use of a caption in the step",
        "remove them",
    ),
    Rule(
        ("captions.encode", "captions.variants"),
        {"text_encoders.train": _is(True)},
        "while text_encoders.train is true, where the text encoders encode each use of a caption in the step",
        "set it to false",
    ),
    Rule(
        ("captions.variants",),
        {"captions.encode": _is("while_training")},
        "while captions.encode is while_training, where each use has a text of its own",
        "encode before the training",
    ),
    Rule(
        ("captions.chunk_layout",),
        {"captions.chunks": _is(1)},
        "while captions.chunks is 1",
        "raise it",
    ),
    Rule(
        ("captions.dropout_to",),
        {"captions.dropout": _is(0), "data.sets": _is(None, [])},
        "while captions.dropout is 0",
        "raise it",
    ),
    Rule(
        ("schedule.warmup",),
        {"schedule.name": _is("constant")},
        "while schedule.name is constant",
        "choose constant_with_warmup",
    ),
    Rule(
        ("schedule.warmup",),
        {"schedule.name": _is("range_test")},
        "while schedule.name is range_test, which begins with the smallest rate",
        "choose another schedule",
    ),
    Rule(
        ("schedule.cycles",),
        {"schedule.name": _is_other_than("cosine_with_restarts")},
        "because of schedule.name: only cosine_with_restarts has cycles",
        "choose that",
    ),
    Rule(
        ("schedule.power",),
        {"schedule.name": _is_other_than("polynomial")},
        "because of schedule.name: only polynomial has a power",
        "choose that",
    ),
    Rule(("ema.evaluate",), {"ema.decay": _is(None)}, "without ema.decay", "set it"),
    Rule(("ema.every",), {"ema.post_hoc": _is(False)}, "while ema.post_hoc is false", "set it to true"),
    Rule(
        ("schedule.decay",),
        {"schedule.name": _is_other_than("wsd")},
        "because of schedule.name: only wsd has a decay of its own length",
        "choose that",
    ),
    Rule(
        ("schedule.timescale",),
        {"schedule.name": _is_other_than("inverse_sqrt")},
        "because of schedule.name: only inverse_sqrt has a timescale",
        "choose that",
    ),
    Rule(
        ("schedule.span",),
        {"schedule.name": _is_other_than("range_test")},
        "because of schedule.name: only range_test has a span",
        "choose that",
    ),
    Rule(
        ("loss.huber_c", "loss.huber_schedule"),
        {"loss.type": _is("mse", "l1")},
        "because of loss.type: only huber, smooth_l1 and pseudo_huber use them",
        "choose one of these",
    ),
    Rule(
        ("loss.snr_gamma",),
        {"loss.weighting": _is("none", "debiased", "p2", "v_like")},
        "because of loss.weighting: only min_snr and soft_min_snr have a gamma",
        "choose one of these",
    ),
    Rule(
        ("loss.p2_gamma", "loss.p2_k"),
        {"loss.weighting": _is_other_than("p2")},
        "because of loss.weighting: only p2 uses them",
        "choose that",
    ),
    Rule(
        ("loss.noise_offset_random",),
        {"loss.noise_offset": _is(0)},
        "while loss.noise_offset is 0",
        "raise it",
    ),
    Rule(
        ("loss.p2_k",),
        {"loss.p2_gamma": _is(0)},
        "while loss.p2_gamma is 0",
        "raise it",
    ),
    Rule(
        ("loss.multires_discount",),
        {"loss.multires_iterations": _is(0, 1)},
        "while loss.multires_iterations is 0 or 1, because it is the strength from the second resolution on",
        "raise it",
    ),
    Rule(
        ("timesteps.mean",),
        {"timesteps.distribution": _is_other_than("logit_normal")},
        "because of timesteps.distribution: only logit_normal has a mean",
        "choose that",
    ),
    Rule(
        ("timesteps.std",),
        {"timesteps.distribution": _is("uniform")},
        "while timesteps.distribution is uniform",
        "choose logit_normal or sigmoid",
    ),
    Rule(
        ("lora.init",),
        {"lora.start_from": _is_other_than(None)},
        "with lora.start_from, whose values the adapter starts at",
        "remove lora.start_from",
    ),
    Rule(
        ("lora.conv_rank", "lora.conv_alpha", "lora.rank_stabilized", "lora.lokr_factor"),
        {"lora.start_from": _is_other_than(None)},
        "with lora.start_from, whose modules have ranks and scales of their own",
        "remove lora.start_from",
    ),
    Rule(
        ("lora.init",),
        {"lora.kind": _is("loha", "lokr")},
        "because of lora.kind: only lora and dora have two initializations",
        "choose one of them",
    ),
    Rule(
        ("lora.lokr_factor",),
        {"lora.kind": _is_other_than("lokr")},
        "because of lora.kind: only lokr has a factor",
        "choose that",
    ),
    Rule(
        ("lora.trigger_words", "lora.author", "lora.description"),
        {"lora.metadata": _is("none")},
        "while lora.metadata is none",
        "set it to minimal or full",
    ),
    Rule(
        ("tracking.project", "tracking.entity", "tracking.tags"),
        {"tracking.wandb": _is("off")},
        "while tracking.wandb is off",
        "set it to auto",
    ),
)
# The config of sample.py, and what evaluate.py has besides a training config.
_SCALES = Rule(("lora_scales",), {"adapters": _is([])}, "without adapters", "give some")
SAMPLING = (
    _SCALES,
    Rule(
        ("negative_prompt",),
        {"guidance": _is(1), "prompts": _has_only_texts, "prompts_file": _is(None)},
        "while guidance is 1, which is none",
        "set another guidance",
    ),
    *_own_settings("", {}),
    *_of_prediction(""),
)
EVALUATION = (*EVERYWHERE, _SCALES)


def require_effect(rules: Sequence[Rule], config: BaseModel) -> None:
    """ValueError if a key without effect has another value than its default."""
    values, defaults = _flat(config.model_dump()), default_values(type(config))
    for rule in rules:
        found = [key for key in rule.keys if key in values and values[key] != defaults[key]]
        if found and _holds(rule, values):
            keys = f"{', '.join(found[:-1])} and {found[-1]}" if len(found) > 1 else found[0]
            has, it = ("have", "them") if len(found) > 1 else ("has", "it")
            raise ValueError(f"{keys} {has} no effect {rule.because}: {rule.remedy}, or remove {it}")


def drop_earlier(
    rules: Sequence[Rule], settings: dict[str, Setting], defaults: Mapping[str, Any], recorded: Container[int] = ()
) -> None:
    """Sets keys without effect to their defaults if the layer that made them ineffective is later than the one that gave them, or
    if that one is the config of a run folder, whose numbers are in `recorded`."""
    for rule in rules:
        if _holds(rule, {**defaults, **{key: setting.value for key, setting in settings.items()}}):
            # What has no effect by default never had one: it is refused.
            layer = max(settings[key].layer if key in settings else -1 for key in rule.when)
            for key in rule.keys:
                if key in settings and (settings[key].layer < layer or settings[key].layer in recorded):
                    settings[key] = settings[key]._replace(value=defaults[key], layer=max(layer, settings[key].layer))


def _flat(sections: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The value of each key in nested sections, by dotted name."""
    found: dict[str, Any] = {}
    for name, value in sections.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _holds(rule: Rule, values: Mapping[str, Any]) -> bool:
    return all(test(values.get(key)) for key, test in rule.when.items())
