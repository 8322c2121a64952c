"""Config section of the adapter."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_serializer, model_validator

from sushi_research.config.keys import listed
from sushi_research.config.mapping_list import read_mappings
from sushi_research.config.section import Bounded, Location, Section, Text, require_text

TargetPreset = Literal["attention", "attention_ff", "kohya", "kohya_conv"]


class Override(Section):
    """Settings of some modules. What it does not give is that of `lora`."""

    modules: Text = Field(
        description="Beginning of the modules' paths (down_blocks.1), or a pattern for the whole path (*.attn2.*); those of text "
        "encoders begin with text_encoder"
    )
    rank: Annotated[int, Field(ge=0, le=4096)] | None = Field(
        None, description="As lora.rank; 0 = no adapter in these modules"
    )
    alpha: Annotated[float, Field(ge=1e-6, le=1e6)] | None = Field(None, description="As lora.alpha")
    lr_factor: Annotated[float, Field(ge=0, le=1e6)] | None = Field(
        None, description="Factor of the learning rate; null = 1"
    )

    @model_serializer
    def _given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}


_SETTINGS = tuple(name for name in Override.model_fields if name != "modules")


def read_overrides(value: Any) -> Any:
    """A validator of `lora.overrides`. Raises UserError with one sentence per mistake; each names its key."""
    return read_mappings(value, "lora.overrides", Override, {"modules": "add the beginning of the modules' paths"})


class LoraSection(Section):
    """The adapter."""

    start_from: Location | None = Field(
        None,
        description="Adapter file of any trainer to go on training from, or a run folder (runs/mycat, runs/mycat@250 for a step, "
        "runs/mycat@best); null = a new adapter. Rank, alpha and targets are then those of the file",
    )
    kind: Literal["lora", "dora", "loha", "lokr"] | None = Field(
        "lora",
        description="What is trained beside each layer (docs/kinds.md): lora = two low-rank matrices; dora = these, and the "
        "magnitude of each input; loha = the elementwise product of two such pairs; lokr = a Kronecker product; null = that of "
        "lora.start_from, otherwise the default",
    )
    targets: TargetPreset | Annotated[list[Text], Field(min_length=1), Bounded] | None = Field(
        "attention",
        description="UNet modules that get an adapter: attention = to_q, to_k, to_v, to_out.0; attention_ff adds the "
        "feed-forward layers; kohya also adds proj_in and proj_out; kohya_conv also adds the layers of the resnets, "
        "downsamplers and upsamplers (both as in kohya's sd-scripts); or a list of module name suffixes; null = those of "
        "lora.start_from, otherwise the default",
        json_schema_extra={
            "allowed": "attention, attention_ff, kohya, kohya_conv, "
            "a list of name suffixes such as [to_q, to_k], or null"
        },
    )
    rank: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        16,
        description="Rank of the two matrices in each adapter module; null = that of lora.start_from, otherwise the default",
    )
    alpha: Annotated[float, Field(ge=1e-6, le=1e6)] | None = Field(
        16.0,
        description="The adapter's output is scaled by alpha / rank. Changing rank does not change alpha; null = that of "
        "lora.start_from, otherwise the default",
    )
    conv_rank: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None, description="Rank of convolutions with a kernel larger than 1x1 (kohya's conv_dim); null = as lora.rank"
    )
    conv_alpha: Annotated[float, Field(ge=1e-6, le=1e6)] | None = Field(
        None, description="Alpha of convolutions with a kernel larger than 1x1; null = as lora.alpha"
    )
    overrides: Annotated[list[Override], BeforeValidator(read_overrides), Bounded] = Field(
        [],
        description="Other ranks, alphas and learning rates for some modules; of several entries that fit one, the last that "
        "gives a setting counts",
        json_schema_extra={"allowed": f"a list of mappings with modules and any of {listed(_SETTINGS)}"},
    )
    rank_stabilized: bool = Field(
        False, description="Scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA, arXiv 2312.03732)"
    )
    lokr_factor: int = Field(
        -1,
        ge=-1,
        le=65_536,
        description="With lora.kind lokr: size of the first matrix of the Kronecker product, as LyCORIS has it; -1 = as near to "
        "that of the second as the layer's sizes allow",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability on the adapter's input while training")
    rank_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Probability, for each sample, of leaving out a row of the first matrix while training (with loha and lokr an "
        "output of the adapter)",
    )
    module_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Probability, for each sample and module, of leaving out the adapter while training",
    )
    max_norm: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="After each step, scale down the adapter of a module whose norm is larger (kohya's scale_weight_norms); null = "
        "off",
    )
    init: Literal["default", "gaussian"] = Field(
        "default",
        description="Initialization of the first matrix: default = Kaiming uniform, gaussian = standard deviation "
        "1 / rank. The second matrix starts at zero, so training starts exactly at the base model",
    )
    save_dtype: Literal["float16", "bfloat16", "float32"] = Field(
        "float16", description="Dtype of the adapter file; the magnitudes of a DoRA and alphas are float32"
    )
    metadata: Literal["full", "minimal", "none"] = Field(
        "full",
        description="What the adapter file says about itself: full = also the words of the captions, the names of the data's "
        "folders, a small sample picture and the settings; minimal = what programs need to load it right, hashes, and what the "
        "next three keys give; none = nothing",
    )
    trigger_words: Annotated[list[Text], Bounded] = Field(
        [], description="Words that call up what was learned, for programs that show them (in the file's metadata)"
    )
    author: Text | None = Field(None, description="Author, in the file's metadata")
    description: Annotated[str, Field(min_length=1, max_length=10_000)] | None = Field(
        None, description="Description, in the file's metadata"
    )

    @model_validator(mode="before")
    @classmethod
    def _null_has_a_value_without_a_file(cls, given: Any) -> Any:
        """With start_from, null and what is not given are those of the file (training/starting_point.py); else the default."""
        if not isinstance(given, dict):
            return given
        names = ("kind", "targets", "rank", "alpha")
        if given.get("start_from") is not None:
            return dict.fromkeys(names) | given
        return {name: value for name, value in given.items() if value is not None or name not in names}

    @model_validator(mode="after")
    def _metadata_is_text(self) -> LoraSection:
        texts = {"lora.trigger_words": self.trigger_words, "lora.author": [self.author or ""]}
        require_text(texts | {"lora.description": [self.description or ""]})
        return self

    @model_validator(mode="after")
    def _targets_are_distinct(self) -> LoraSection:
        if isinstance(self.targets, list) and len(set(self.targets)) < len(self.targets):
            raise ValueError("lora.targets names a module twice: keep one of each")
        return self

    @model_validator(mode="after")
    def _overrides_give_a_setting(self) -> LoraSection:
        for number, override in enumerate(self.overrides):
            if all(getattr(override, name) is None for name in _SETTINGS):
                raise ValueError(
                    f"lora.overrides[{number}] has no effect: give {', '.join(_SETTINGS[:-1])} or {_SETTINGS[-1]} besides modules, "
                    "or remove it"
                )
        return self

    @model_validator(mode="after")
    def _ranks_are_those_of_the_file(self) -> LoraSection:
        for number, override in enumerate(self.overrides if self.start_from is not None else ()):
            for name in ("rank", "alpha"):
                if getattr(override, name) is not None:
                    raise ValueError(
                        f"lora.overrides[{number}].{name} has no effect with lora.start_from, whose modules have ranks and alphas "
                        "of their own: remove it"
                    )
        return self

    @model_validator(mode="after")
    def _factor_is_a_size(self) -> LoraSection:
        if self.lokr_factor == 0:
            raise ValueError("lora.lokr_factor is 0: give -1, or the size of the first matrix")
        return self
