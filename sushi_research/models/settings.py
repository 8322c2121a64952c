"""The settings in the config.json of a base's components: what each may be, so that none changes the result silently.

diffusers and transformers build a component from its config.json. A setting of the tables below may have any value that its rule
allows. Any other setting must have the library's default, because nobody has tried our training with another value. It is
refused by its name, and so is a setting that the library does not know.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sushi_research.errors import UserError
from sushi_research.models import ARCHITECTURES
from sushi_research.models.components import CLASSES, model_class
from sushi_research.models.shapes import POSITIONS, published


class Rule(NamedTuple):
    """What a setting may be: a test of its value, and the allowed values as text. `because` is added to the refusal."""

    allows: Callable[[Any], bool]
    wanted: str
    because: str = ""


def one_of(*values: Any, because: str = "") -> Rule:
    """The rule that a setting has one of these values."""
    wanted = " or ".join(json.dumps(value) for value in values)
    return Rule(lambda found: any(same(found, value) for value in values), wanted, because)


def same(found: Any, wanted: Any) -> bool:
    """Whether two values of a JSON file mean the same: 1 is 1.0, null is false, but 1 is neither true nor "1"."""
    if isinstance(found, list | tuple) and isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    if found is None and wanted is False:
        return True
    return isinstance(found, bool) == isinstance(wanted, bool) and found == wanted


def _is_size(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_is_size, value))
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _blocks(*names: str) -> Rule:
    wanted = f"a list of {' and '.join(names)}"
    return Rule(lambda found: isinstance(found, list | tuple) and set(map(str, found)) <= set(names), wanted)


SIZE = Rule(_is_size, "an integer, or a list of integers")
SIZE_OR_NULL = Rule(lambda value: value is None or _is_size(value), f"null, {SIZE.wanted}")
SWITCH = Rule(lambda value: value is None or isinstance(value, bool), "true, false or null")
BOOLEAN = Rule(lambda value: isinstance(value, bool), "true or false")
NUMBER = Rule(lambda value: isinstance(value, int | float) and not isinstance(value, bool), "a number")
ANY = Rule(lambda value: True, "anything")

UNET = {
    "_class_name": one_of(CLASSES["unet"]),
    "_use_default_values": one_of(None, []),  # the settings that diffusers would not take from the file
    "in_channels": one_of(4),
    "out_channels": one_of(4),
    **dict.fromkeys(("block_out_channels", "layers_per_block", "norm_num_groups", "cross_attention_dim"), SIZE),
    **dict.fromkeys(("transformer_layers_per_block", "attention_head_dim"), SIZE),
    **dict.fromkeys(("addition_time_embed_dim", "projection_class_embeddings_input_dim"), SIZE_OR_NULL),
    "reverse_transformer_layers_per_block": SIZE_OR_NULL,
    "down_block_types": _blocks("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": _blocks("UpBlock2D", "CrossAttnUpBlock2D"),
    "mid_block_type": one_of(
        "UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None
    ),  # small distilled models have no middle block
    "dropout": one_of(0.0, because=" because its noise is not a function of the seed, so a continued run would differ"),
    # Settings without an effect on training:
    "sample_size": ANY,  # only the size at which a pipeline generates if none is asked for
    "upcast_attention": ANY,  # the kernels of PyTorch and xformers compute scores in fp32, and diffusers' call does not ask
    "addition_embed_type_num_heads": ANY,  # belongs to the conditioning "text", which is refused
    # The bookkeeping of diffusers' EMAModel, whose save_pretrained writes it into the UNet's config:
    **dict.fromkeys(("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step"), ANY),
    "use_ema_warmup": ANY,
}
VAE = {
    "_class_name": one_of(CLASSES["vae"]),
    "_use_default_values": one_of(None, []),
    "in_channels": one_of(3),
    "out_channels": one_of(3),
    "latent_channels": one_of(4),
    **dict.fromkeys(("block_out_channels", "layers_per_block", "norm_num_groups"), SIZE),
    "down_block_types": _blocks("DownEncoderBlock2D"),
    "up_block_types": _blocks("UpDecoderBlock2D"),
    "latents_mean": one_of(None),
    "latents_std": one_of(None),
    "shift_factor": one_of(None, 0.0),
    "force_upcast": SWITCH,
    "sample_size": ANY,  # only the size of the tiles in which a large image is encoded, which is off
}
TEXT_CLASSES = (CLASSES["text_encoder"], CLASSES["text_encoder_2"])
TEXT = {
    "architectures": Rule(
        lambda found: not found or (isinstance(found, list) and set(map(str, found)) <= set(TEXT_CLASSES)),
        f"a list of {' or '.join(TEXT_CLASSES)}",
    ),
    "model_type": one_of("clip_text_model"),
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), SIZE),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), SIZE),
    "projection_dim": SIZE_OR_NULL,
    "max_position_embeddings": one_of(POSITIONS),
    "hidden_act": one_of("quick_gelu", "gelu"),
    # Settings without an effect on training:
    **dict.fromkeys(("attention_dropout", "dropout"), NUMBER),  # a text encoder is always in evaluation mode
    **dict.fromkeys(("initializer_factor", "initializer_range"), ANY),  # for weights that are trained from nothing
    **dict.fromkeys(("bos_token_id", "pad_token_id"), ANY),  # the ids are the tokenizer's
    # Without it transformers cannot compute a pooled output. Where that is used, `Base.load_tokenizer` compares the ids.
    "eos_token_id": Rule(lambda value: type(value) is int, "an integer"),
    "output_hidden_states": SWITCH,  # our calls say it
    **dict.fromkeys(("dtype", "torch_dtype", "transformers_version", "gradient_checkpointing"), ANY),
    **dict.fromkeys(
        ("id2label", "label2id", "problem_type", "tokenizer_class"), ANY
    ),  # for classifiers, and for AutoTokenizer
    # For models that generate text. transformers 4 could write all of them into any model's config.
    **dict.fromkeys(("max_length", "min_length", "num_beams", "num_beam_groups", "num_return_sequences"), ANY),
    **dict.fromkeys(("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"), ANY),
    **dict.fromkeys(("do_sample", "early_stopping", "use_cache", "tie_word_embeddings"), ANY),
}
# The settings that tell the architectures apart, with the libraries' defaults. Each must have the published value.
OWN = {"unet": {"addition_embed_type": None, "use_linear_projection": False}, "vae": {"scaling_factor": 0.18215}}
TABLES = {"unet": UNET, "vae": VAE, "text_encoder": TEXT, "text_encoder_2": TEXT}


def require(name: str, config: Mapping[str, Any], architecture: str, where: str) -> None:
    """UserError, naming the setting, unless each setting of a component's config is one that this suite uses as it is meant.

    `name` is the component ("unet"), `where` its config in messages.
    """
    rules, facts, label = dict(TABLES[name]), published(architecture)[name], ARCHITECTURES[architecture].label
    for key, default in OWN.get(name, {}).items():
        rules[key] = one_of(facts.get(key, default), because=f" ({label}'s)")
    part = {"unet": "UNet", "vae": "VAE"}.get(name, "text encoder")
    require_settings(config, rules, defaults_of(name), where, f"choose a {part} of an {label} model")


def defaults_of(name: str) -> dict[str, Any]:
    """The library's default of each setting of a component."""
    kind = model_class(name)
    return kind.config_class().to_dict() if name.startswith("text_encoder") else signature_defaults(kind)


def signature_defaults(kind: Any) -> dict[str, Any]:
    """The default of each argument of a class's constructor."""
    arguments = inspect.signature(kind.__init__).parameters.values()
    return {each.name: each.default for each in arguments if each.default is not inspect.Parameter.empty}


def require_settings(
    config: Mapping[str, Any], rules: Mapping[str, Rule], defaults: Mapping[str, Any], where: str, advice: str
) -> None:
    """UserError for the first setting that its rule, or without a rule the library's default, does not allow.

    A missing setting has the library's default. Names that begin with `_` are bookkeeping, unless they have a rule.
    """
    for key in (*rules, *sorted(config.keys() - rules.keys())):
        rule = rules.get(key)
        if rule is None and key.startswith("_"):
            continue
        if rule is None and key in defaults:
            rule = one_of(defaults[key])
        if rule is None:
            if config[key] in (None, False, [], {}):
                continue
            raise UserError(
                f"{where} has the setting {shown(key)} ({shown(config[key])}), which this suite does not know: {advice}, or "
                "remove it from the file if it has no meaning."
            )
        if key in config and not rule.allows(config[key]):
            has = f"has {key} {shown(config[key])}"
        elif key not in config and key in defaults and not rule.allows(defaults[key]):
            has = f"has no {key}, which means {shown(defaults[key])}"
        else:
            continue
        raise UserError(
            f"{where} {has}, but this suite takes only {rule.wanted}{rule.because}: {advice}, or correct the file if it is wrong."
        )


def shown(value: Any) -> str:
    """A value of a JSON file on one printable line, at most 80 characters."""
    text = value if isinstance(value, str) and value.isidentifier() else json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
