"""What an adapter file says about itself."""

import json

import pytest

from sushi_research.adapters.metadata import MINIMAL, Ancestor, Facts, adapter_metadata, ancestors_of, describe
from sushi_research.config import SD15Training, SDXLTraining
from sushi_research.data.samples import Sample, Samples
from sushi_research.models.header import MAX_HEADER, Header
from sushi_research.models.prediction import Prediction, from_metadata

FACTS = {
    "name": "photos",
    "steps": 100,
    "epochs": 2,
    "base": "owner/base",
    "base_hash": "b" * 32,
    "dataset_hash": "d" * 32,
    "config_hash": "c" * 32,
    "images": 50,
    "trained": (1_700_000_000.0, 1_700_003_600.5),
    "prediction": Prediction(),
}


def described(config, samples=(), **facts):
    return adapter_metadata(config, Facts(**FACTS | facts, samples=Samples.of(samples)))


def config(kind=SDXLTraining, targets=("to_q",), lora=None, **sections):
    targets = targets if isinstance(targets, str) else list(targets)
    return kind(
        model={"base": "x"},
        data={"path": "x/photos/", "resolution": 1024},
        lora={"targets": targets, "rank": 8, "alpha": 4.0} | (lora or {}),
        train={"steps": 100},
        **sections,
    )


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("sd15", ("sd_v1", "stable-diffusion-v1/lora", "diffusers")),
        (
            "sdxl",
            ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "https://github.com/Stability-AI/generative-models"),
        ),
    ],
)
def test_metadata_that_programs_read(architecture, expected):
    metadata = described(config(), architecture=architecture)
    assert all(type(value) is str for value in metadata.values())
    # A1111 decides by the first whether the adapter is shown at all; InvokeAI splits the second at its slash.
    keys = ("ss_base_model_version", "modelspec.architecture", "modelspec.implementation")
    assert tuple(metadata[key] for key in keys) == expected
    # What kohya's own tools need to rebuild the network.
    assert metadata["ss_v2"] == metadata["ss_zero_terminal_snr"] == "False"
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("8", "4.0")
    assert json.loads(metadata["ss_network_args"]) == {}
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert metadata["modelspec.resolution"] == "1024x1024"
    assert metadata["modelspec.date"] == "2023-11-14T23:13:20+00:00"
    assert metadata["modelspec.title"] == metadata["ss_output_name"] == "photos"
    assert metadata["sushi_research.dataset_hash"] == "d" * 32


@pytest.mark.parametrize(
    ("architecture", "version", "zero_terminal_snr"), [("sd15", "sd_v1_v", False), ("sdxl", "sdxl_base_v1-0", True)]
)
def test_metadata_of_a_base_that_predicts_v(architecture, version, zero_terminal_snr):
    prediction = Prediction("v_prediction", zero_terminal_snr)
    metadata = described(config(), architecture=architecture, **{"prediction": prediction})
    assert metadata["ss_base_model_version"] == version
    assert metadata["modelspec.prediction_type"] == "v"
    assert metadata["ss_zero_terminal_snr"] == str(zero_terminal_snr)
    # What is written is what a base's own metadata is read by.
    assert [found.type for found in from_metadata(metadata, "it") if found.type] == ["v_prediction"]


@pytest.mark.parametrize("level", ["full", "minimal"])
def test_metadata_of_a_base_that_predicts_a_rectified_flow(level):
    flow, settings = Prediction("rectified_flow", shift=2.5), config(lora={"metadata": level})
    for architecture, version in (("sd15", "sd_v1"), ("sdxl", "sdxl_base_v1-0")):
        metadata = described(settings, architecture=architecture, **{"prediction": flow})
        assert metadata["ss_base_model_version"] == version
        assert metadata["sushi_research.flow_shift"] == "2.5"
        assert [found.type for found in from_metadata(metadata, "it") if found.type] == ["rectified_flow"]


def test_metadata_of_convolutions_and_options():
    sections = {"targets": "kohya_conv", "loss": {"snr_gamma": 5.0}}
    metadata = described(config(**sections), architecture="sdxl")
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "8", "conv_alpha": "4.0"}
    assert (metadata["ss_min_snr_gamma"], metadata["ss_output_name"]) == ("5.0", "photos")
    # What is not set, or the architecture does not have, is skipped.
    assert not {"ss_noise_offset", "ss_clip_skip"} & metadata.keys()
    assert described(config(SD15Training), architecture="sd15")["ss_clip_skip"] == "1"


def test_metadata_of_losses_and_noise_have_kohyas_keys_where_the_meaning_is_the_same():
    loss = {"type": "pseudo_huber", "huber_c": 0.2, "weighting": "min_snr", "multires_iterations": 6}
    found = described(config(loss=loss, timesteps={"max": 900}), architecture="sdxl")
    assert (found["ss_loss_type"], found["ss_huber_schedule"], found["ss_huber_c"]) == ("huber", "snr", "0.2")
    assert (found["ss_min_snr_gamma"], found["ss_multires_noise_discount"]) == ("5.0", "0.3")
    assert json.loads(found["sushi_research.objective"]) == {"loss": loss, "timesteps": {"max": 900}}
    other = {"type": "huber", "weighting": "debiased", "input_perturbation": 0.1, "noise_offset": 0.1}
    found = described(config(loss=other), architecture="sdxl")
    assert (found["ss_debiased_estimation"], found["ss_ip_noise_gamma"]) == ("True", "0.1")
    of_v = described(config(loss=other), architecture="sdxl", prediction=Prediction("v_prediction"))
    assert "ss_debiased_estimation" not in of_v, "kohya's is another for v"
    assert json.loads(of_v["sushi_research.objective"])["loss"]["weighting"] == "debiased"
    soft = {"weighting": "soft_min_snr", "snr_gamma": 3.0}
    assert json.loads(described(config(loss=soft), architecture="sdxl")["sushi_research.objective"]) == {"loss": soft}
    # kohya's smooth_l1 and huber are others; there is no cap.
    assert not {"ss_loss_type", "ss_huber_c", "ss_min_snr_gamma", "ss_multires_noise_discount"} & found.keys()
    # Files of runs that had them before stay as they were.
    plain = described(config(loss={"snr_gamma": 3.0, "noise_offset": 0.1}), architecture="sdxl")
    assert (plain["ss_min_snr_gamma"], plain["ss_noise_offset"]) == ("3.0", "0.1")
    assert "sushi_research.objective" not in plain


def sample(name, caption, repeats=1):
    return Sample(name, name, caption, 64, 64, repeats, bytes)


SAMPLES = [
    sample("5_cat/a.png", "MyCat, red hat,, on a sofa", 5),
    sample("5_cat/b.png", "mycat , blue hat", 5),
    sample("c.png", "secret words, 雪"),
]


def test_the_words_of_the_captions_are_counted_as_kohya_counts_them():
    metadata = described(config(), architecture="sdxl", samples=SAMPLES)
    counted = json.loads(metadata["ss_tag_frequency"])
    assert counted == {
        "5_cat": {"mycat": 2, "red hat": 1, "on a sofa": 1, "blue hat": 1},
        "photos": {"secret words": 1, "雪": 1},
    }
    assert list(counted) == ["5_cat", "photos"], "Lora-Manager reads the first one"
    folders = {"5_cat": {"n_repeats": 5, "img_count": 2}, "photos": {"n_repeats": 1, "img_count": 1}}
    assert json.loads(metadata["ss_dataset_dirs"]) == folders


def test_long_captions_leave_a_header_that_programs_read():
    """A caption is at most 65,536 letters; each of these is one tag."""
    samples = [sample(f"{number}/{number}.png", f"{number}" + "\\" * 65_000) for number in range(100)]
    samples += [sample(f"0/{letter}.png", f"a cat, {letter}") for letter in "ab"]
    metadata = described(config(), architecture="sdxl", samples=samples)
    assert json.loads(metadata["ss_tag_frequency"])["0"]["a cat"] == 2
    assert len(json.dumps(metadata)) < MAX_HEADER / 4


GIVEN = {"trigger_words": ["mycat", "1cat"], "author": "me", "description": "A cat.\nOf mine."}


@pytest.mark.parametrize("level", ["full", "minimal"])
def test_what_the_user_gives_is_in_the_file_and_nothing_else_of_the_data_in_a_minimal_one(level):
    chain = [Ancestor("first", "a" * 64, 100), Ancestor("other", "b" * 64, None)]
    settings = config(lora=GIVEN | {"metadata": level})
    metadata = described(settings, architecture="sdxl", samples=SAMPLES, started_from=chain)
    assert metadata["modelspec.trigger_phrase"] == "mycat, 1cat"
    assert json.loads(metadata["ss_datasets"])[0]["subsets"][0]["class_tokens"] == "mycat, 1cat"
    assert (metadata["modelspec.author"], metadata["modelspec.description"]) == ("me", GIVEN["description"])
    said = json.loads(metadata["sushi_research.started_from"])
    assert [each["name"] for each in said] == ["first", "other"]
    text = json.dumps(metadata, ensure_ascii=False)
    for word in ("secret", "雪", "5_cat", "photos/", "learning_rate", "owner/base"):
        assert (word in text) == (level == "full" and word != "photos/"), word
    if level == "minimal":
        assert set(metadata) == set(MINIMAL) - {"sushi_research.flow_shift"}, "a base that predicts the noise has none"
    line = describe(settings)
    assert line.startswith(f"{level}: ") and "trigger words mycat, 1cat; author me; description A cat." in line
    assert "earlier adapters" not in line
    assert "names of earlier adapters" in describe(config(lora={"metadata": level, "start_from": "runs/first"}))


def test_no_metadata_and_modules_that_differ():
    assert described(config(lora={"metadata": "none"}), architecture="sdxl", samples=SAMPLES) == {}
    assert describe(config(lora={"metadata": "none"})).startswith("none: ")
    metadata = described(config(targets="kohya_conv"), architecture="sdxl", is_uniform=False)
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "Dynamic"
    assert metadata["ss_network_args"] == "{}"
    # All modules are convolutions, or an override fits all of them.
    settings = config(targets=["conv1"], lora={"conv_rank": 12, "conv_alpha": 3.0})
    metadata = described(settings, architecture="sdxl", rank_and_scale=(12, 3.0 / 12))
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("12", "3.0")
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "12", "conv_alpha": "3.0"}
    dora = described(config(lora={"kind": "dora"}), architecture="sdxl", rank_and_scale=(12, 0.25))
    assert (dora["ss_network_dim"], dora["ss_network_alpha"]) == ("12", "12.0")


def test_the_chain_of_files_is_read_as_it_was_written(tmp_path):
    def header(**entries):
        return Header(tmp_path / "mine.safetensors", {}, entries)

    first = ancestors_of(header(ss_output_name="first", ss_steps="100"), "a" * 64)
    assert first == (Ancestor("first", "a" * 64, 100),)
    metadata = described(config(), architecture="sdxl", started_from=first)
    second = ancestors_of(header(**metadata), "b" * 64)
    assert second == (*first, Ancestor("photos", "b" * 64, 100))
    # A stranger's file says what it likes.
    for said in ("{", "[1]", '[{"name": 1}]', "3", '[{"name": [], "hash": 2, "steps": 1}]', "[" * 200 + "]" * 200):
        strange = header(**{"sushi_research.started_from": said, "ss_steps": "1e9"})
        assert ancestors_of(strange, "c") == (Ancestor("mine", "c", None),)
