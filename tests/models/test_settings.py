"""Settings in a base's own files: those of published models are used, those that mean something else are refused by name."""

import json
import shutil
from pathlib import Path

import pytest
from cases import case

from sushi_research.errors import UserError
from sushi_research.models import loading, schedulers, settings
from testing.real_configs import SD15_TEXT, SD15_UNET, SD15_VAE, SDXL_TEXT_1, SDXL_TEXT_2, SDXL_UNET, SDXL_VAE

PUBLISHED = {
    "sd15": {"unet": SD15_UNET, "vae": SD15_VAE, "text_encoder": SD15_TEXT},
    "sdxl": {"unet": SDXL_UNET, "vae": SDXL_VAE, "text_encoder": SDXL_TEXT_1, "text_encoder_2": SDXL_TEXT_2},
}
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
PNDM = SCHEDULE | {
    "_class_name": "PNDMScheduler",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
# Settings of fine-tuned models that change nothing here, or that are used as they are meant.
HARMLESS = {
    "unet": [
        {"decay": 0.9999, "optimization_step": 10, "use_ema_warmup": False, "_name_or_path": "x"},
        {"upcast_attention": True, "sample_size": 96, "only_cross_attention": None},
        {"mid_block_type": None, "reverse_transformer_layers_per_block": [[4, 4], 2, 1]},
    ],
    "vae": [{"force_upcast": False, "latents_mean": None, "shift_factor": None, "use_quant_conv": True}],
    "text_encoder": [
        {"dropout": 0.1, "attention_dropout": 0.1, "torch_dtype": "float16", "architectures": ["CLIPTextModel"]},
        # The configs of the published SD1.5 and of most models derived from it name where they were loaded from.
        {"_name_or_path": "openai/clip-vit-large-patch14", "_attn_implementation_autoset": True},
        # transformers 4, when it wrote every setting.
        {
            "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
            "max_length": 20,
            "top_k": 50,
            "temperature": 1.0,
            "is_decoder": False,
        },
    ],
}
REFUSED = {
    "unet": [
        *({"dropout": value} for value in (0.1, "0.0", None, True)),
        *({"act_fn": "gelu"}, {"norm_eps": 1e-6}, {"center_input_sample": True}, {"flip_sin_to_cos": "false"}),
        *(
            {"resnet_time_scale_shift": "scale_shift"},
            {"out_channels": 8},
            {"num_class_embeds": 10},
            {"attention_type": "gated"},
        ),
        *(
            {"encoder_hid_dim": 768},
            {"layers_per_block": "2"},
            {"norm_num_groups": True},
            {"attention_head_dim": [8.5]},
        ),
        *(
            {"_class_name": "UNetMotionModel"},
            {"quantization_config": {"load_in_8bit": True}},
            {"_use_default_values": ["use_linear_projection"]},
            {"down_block_types": ["Other"]},
        ),
    ],
    "vae": [
        *(
            {"latents_mean": [0.0] * 4},
            {"latents_std": [1.0] * 4},
            {"shift_factor": 0.1},
            {"scaling_factor": "0.18215"},
        ),
        *({"force_upcast": "false"}, {"force_upcast": 0}, {"latent_channels": 16}, {"use_quant_conv": False}),
        *(
            {"_class_name": "AutoencoderTiny"},
            {"_class_name": "AsymmetricAutoencoderKL"},
            {"mid_block_add_attention": "false"},
        ),
    ],
    "text_encoder": [
        *({"hidden_act": "relu"}, {"layer_norm_eps": 1e-6}, {"max_position_embeddings": 248}, {"model_type": "clip"}),
        *({"architectures": ["T5EncoderModel"]}, {"text_config": {"hidden_size": 768}}, {"return_dict": False}),
    ],
}


def test_the_published_configs_are_used():
    for architecture, configs in PUBLISHED.items():
        for name, config in configs.items():
            for changes in ({}, *HARMLESS.get(name, [])):
                with case(f"{architecture}, {name}, {changes}"):
                    settings.require(name, config | changes, architecture, "it")


def test_a_setting_that_means_something_else_is_refused_by_its_name():
    for architecture, configs in PUBLISHED.items():
        for name, config in configs.items():
            for changes in REFUSED[name.removesuffix("_2")]:
                with case(f"{architecture}, {name}, {changes}"):
                    with pytest.raises(UserError) as caught:
                        settings.require(name, config | changes, architecture, "it")
                    assert next(iter(changes)) in str(caught.value) and str(caught.value).isprintable()
    # A missing setting means the library's default, which is SD1.5's.
    with pytest.raises(UserError, match="has no scaling_factor, which means 0.18215"):
        settings.require("vae", {key: SDXL_VAE[key] for key in SDXL_VAE if key != "scaling_factor"}, "sdxl", "it")


ACCEPTED_SCHEDULES = [
    *({}, {"rescale_betas_zero_snr": None}, {"use_karras_sigmas": True}, {"timestep_spacing": "trailing"}),
    *({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, {"clip_sample": True}),
    # diffusers keeps the keys of the scheduler that another one was made from.
    {"_class_name": "EulerDiscreteScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0},
]
REFUSED_SCHEDULES = [
    *({"_class_name": f"{name}Scheduler"} for name in ("EDMEuler", "FlowMatchLCM", "LCM", "TCD", "UnCLIP", "Mine")),
    *({"trained_betas": [0.1]}, {"rescale_betas_zero_snr": "True"}, {"rescale_betas_zero_snr": "false"}),
    *(
        {"beta_end": "0.012"},
        {"beta_start": None},
        {"num_train_timesteps": 1000.5},
        {"beta_schedule": ["scaled_linear"]},
    ),
    *(
        {"prediction_type": None},
        {"predict_epsilon": False},
        {"use_flow_sigmas": "True"},
        {"shift": 3.0},  # carried from a scheduler for flows
        {"prediction_type": "flow_prediction"},  # without use_flow_sigmas
        {"timestep_type": "continuous"},
    ),
    *({"sigma_max": 80.0}, {"use_karras_sigmas": "False"}, {"steps_offset": "1"}, {"timestep_spacing": "even"}),
    *({"snr_shift_scale": 3.0}, {"_use_default_values": ["beta_end"]}),
]


def test_the_scheduler_s_settings():
    path = Path("base/scheduler/scheduler_config.json")
    for changes in ACCEPTED_SCHEDULES:
        with case(changes):
            schedulers.require_scheduler(PNDM | changes, "sdxl", {}, path)
    for changes in REFUSED_SCHEDULES:
        with case(changes), pytest.raises(UserError, match=next(iter(changes))):
            schedulers.require_scheduler(PNDM | changes, "sdxl", {}, path)
    for key in ("beta_schedule", "beta_start", "beta_end"):
        without = {name: value for name, value in PNDM.items() if name != key}
        with pytest.raises(UserError, match=f"has no {key}, which means"):
            schedulers.require_scheduler(without, "sdxl", {}, path)


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
UNIPC = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True}
ACCEPTED_FLOWS = [
    *(FLOW, UNIPC, UNIPC | {"flow_shift": 3, "beta_schedule": "linear", "use_dynamic_shifting": False}),
    FLOW | {"base_shift": 0.5, "max_shift": 1.15, "time_shift_type": "linear", "stochastic_sampling": True},
    # Made from the scheduler of SDXL's repository, whose keys diffusers keeps.
    {**PNDM, "timestep_spacing": "leading", **FLOW, "sample_max_value": 1.0},
    {"_class_name": "FlowMatchHeunDiscreteScheduler"},
]
REFUSED_FLOWS = [
    *(
        {"shift": 0},
        {"shift": 1e-20},
        {"shift": 101},
        {"shift": "3"},
        {"shift": True},
        {"shift": float("nan")},
        {"num_train_timesteps": 100},
    ),
    *({"use_dynamic_shifting": True}, {"shift_terminal": 0.02}, {"invert_sigmas": True}, {"use_karras_sigmas": True}),
    *({"use_beta_sigmas": True}, {"use_exponential_sigmas": True}, {"prediction_type": 1}, {"my_option": 1}),
]


def test_the_settings_of_a_scheduler_for_flows():
    path = Path("base/scheduler/scheduler_config.json")
    for config in ACCEPTED_FLOWS:
        with case(config):
            schedulers.require_scheduler(config, "sd15", {}, path)
    for changes in REFUSED_FLOWS:
        for config in (FLOW, UNIPC):
            changed = {"flow_shift" if config is UNIPC and key == "shift" else key: changes[key] for key in changes}
            with case((config, changed)), pytest.raises(UserError, match=next(iter(changed))):
                schedulers.require_scheduler(config | changed, "sdxl", {}, path)


def change(file: Path, **changes):
    """Changes keys of a JSON file; the key REMOVED names one to remove."""
    content = json.loads(file.read_text()) | changes
    content.pop(content.pop("REMOVED", None), None)
    file.write_text(json.dumps(content))


@pytest.fixture
def folder(bases, tmp_path):
    return shutil.copytree(bases["sdxl"], tmp_path / "base")


def refused(source, **options) -> str:
    with pytest.raises(UserError) as caught:
        loading.resolve_base(str(source), **options)
    return str(caught.value)


def load_tokenizer(folder):
    return loading.resolve_base(str(folder)).load_tokenizer("text_encoder_2")


def test_a_component_is_checked_wherever_it_comes_from(folder, bases):
    change(folder / "vae/config.json", latents_std=[1.0, 2.0, 3.0, 4.0])
    assert "latents_std" in refused(bases["sdxl"], vae=str(folder / "vae"))
    assert "latents_std" in refused(folder)
    loading.resolve_base(str(folder), vae=str(bases["sdxl"]))  # a VAE that is replaced is not asked
    for value in (None, [2], "2"):
        with case(value):  # transformers would fail while it encodes
            change(folder / "text_encoder/config.json", eos_token_id=value)
            assert "eos_token_id" in refused(bases["sdxl"], text_encoders=str(folder))
    change(folder / "text_encoder/config.json", eos_token_id=0)  # the pooled output of the first encoder is not used
    loading.resolve_base(str(bases["sdxl"]), text_encoders=str(folder))
    unet = shutil.copytree(bases["sd15"], folder.parent / "sd15") / "unet/config.json"
    change(unet, use_linear_projection="False")
    assert 'use_linear_projection "False"' in refused(unet.parents[1])
    change(folder / "text_encoder_2/config.json", hidden_act="relu")
    assert "hidden_act" in refused(bases["sdxl"], text_encoders=str(folder))


def test_what_model_index_says(folder, bases):
    index = folder / "model_index.json"
    assert loading.resolve_base(str(folder)).force_zeros
    change(index, REMOVED="force_zeros_for_empty_prompt")
    assert loading.resolve_base(str(folder)).force_zeros, "the default of diffusers' SDXL pipeline"
    change(index, _class_name="StableDiffusionXLPAGPipeline")  # the same components, another way to sample
    loading.resolve_base(str(folder))
    for changes in (
        {"force_zeros_for_empty_prompt": "False"},
        {"_class_name": "LatentConsistencyModelPipeline"},
        {"_class_name": ["my_pipeline", "MyPipeline"]},
        {"vae": ["diffusers", "AutoencoderTiny"]},
        {"scheduler": ["diffusers", "FlowMatchLCMScheduler"]},
    ):
        with case(changes):
            shutil.copy(bases["sdxl"] / "model_index.json", index)
            change(index, **changes)
            assert next(iter(changes)) in refused(folder)


def test_the_pooled_output_is_taken_at_the_end_of_the_caption(folder, bases):
    config, end = folder / "text_encoder_2/config.json", 513  # the tiny tokenizer's end token
    for value in (2, end):
        change(config, eos_token_id=value)
        load_tokenizer(folder)
    for value in (0, 49407, None, [end], "513", 513.0):
        with case(value), pytest.raises(UserError, match="eos_token_id"):
            change(config, eos_token_id=value)
            load_tokenizer(folder)
    change(config, REMOVED="eos_token_id")
    with pytest.raises(UserError, match="eos_token_id 49407"):
        load_tokenizer(folder)


TOKENIZER_CONFIGS = [
    *({"padding_side": "left"}, {"truncation_side": "left"}, {"do_lower_case": False}, {"add_prefix_space": True}),
    *({"add_bos_token": False}, {"tokenizer_class": "T5Tokenizer"}, {"split_special_tokens": True}, {"my_option": 1}),
    *(
        {"pad_token": None},
        {"eos_token": "a"},
        {"bos_token": "a"},
        {"model_max_length": "77"},
        {"model_max_length": 76},
    ),
]


def test_a_tokenizer_s_settings(folder):
    files = [folder / "tokenizer_2" / name for name in ("tokenizer_config.json", "tokenizer.json")]
    usual = [file.read_text() for file in files]
    for changes in TOKENIZER_CONFIGS:
        with case(changes), pytest.raises(UserError, match=str(files[0].parent)):
            change(files[0], **changes)
            load_tokenizer(folder)
        files[0].write_text(usual[0])
    padding = {
        "strategy": {"Fixed": 77},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
    }
    for changes, words in (
        ({"normalizer": None}, "splits text in another way"),
        ({"post_processor": None}, "splits text in another way"),
        (
            {"truncation": {"direction": "Left", "max_length": 77, "strategy": "LongestFirst", "stride": 0}},
            "truncation_side",
        ),
        ({"padding": padding | {"pad_token": "!"}}, "padding_side"),
        ({"model": json.loads(usual[1])["model"] | {"dropout": 0.5}}, "at random"),
    ):
        with case(words), pytest.raises(UserError, match=words):
            change(files[1], **changes)
            load_tokenizer(folder)
        files[1].write_text(usual[1])
