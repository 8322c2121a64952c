"""What a base predicts: from markers, scheduler config, metadata and options; two that contradict each other stop the run."""

import json
import shutil

import pytest
import torch
from cases import case
from single_files import narrow_base, write_single_file

from sushi_research import objectives
from sushi_research.errors import UserError
from sushi_research.models import loading, sd15, sdxl
from sushi_research.models.prediction import (
    Evidence,
    Prediction,
    decide,
    from_metadata,
    from_names,
    from_scheduler,
    from_single_file,
)
from sushi_research.sampling import pipeline

MODELS = {"sd15": sd15, "sdxl": sdxl}
EPSILON, V, ZERO = Prediction(), Prediction("v_prediction"), Prediction("v_prediction", zero_terminal_snr=True)
FLOW, SHIFTED = Prediction("rectified_flow"), Prediction("rectified_flow", shift=3.0)
ONE = pytest.mark.parametrize("architecture", ["sd15"])  # where no architecture matters
ALL = pytest.mark.parametrize("predicted", [EPSILON, V, ZERO], ids=Prediction.describe)

V_PRED, ZTSNR = "the key v_pred", "the key ztsnr"
SPEC, KEY = (f"modelspec.{name} in the metadata of" for name in ("prediction_type", "predict_key"))
CONFIG = "scheduler/scheduler_config.json"
TYPE_OPTION, ZERO_OPTION = "the option prediction_type", "the option zero_terminal_snr"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {architecture: narrow_base(root / architecture, architecture) for architecture in MODELS}


@pytest.fixture
def of_file(folders, architecture, tmp_path):
    """Resolves a single file with the marker keys and the metadata given."""

    def resolve(markers=(), metadata=None, **options):
        file = write_single_file(
            folders[architecture],
            tmp_path / "model.safetensors",
            architecture,
            extra={name: torch.tensor([]) for name in markers},
            metadata=metadata,
        )
        return loading.resolve_base(str(file), tokenizers=str(folders[architecture]), **options)

    return resolve


@pytest.fixture
def of_folder(bases, architecture, tmp_path):
    """Resolves a folder whose scheduler config has some keys changed (None removes); without one for no config at all."""

    def resolve(changes, **options):
        folder = shutil.copytree(bases[architecture], tmp_path / "base")
        path = folder / CONFIG
        if changes is None:
            path.unlink()
        else:
            config = json.loads(path.read_text()) | changes
            path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
        return loading.resolve_base(str(folder), **options)

    return resolve


def refusal(call, *arguments, **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500 and message.endswith(".")
    return message


# --- single files ---

EPS_DATA, V_DATA = {"modelspec.prediction_type": "epsilon"}, {"modelspec.prediction_type": "v"}
V_COMFY = {"modelspec.predict_key": "v"}
V_ASKED, EPS_ASKED = {"prediction_type": "v_prediction"}, {"prediction_type": "epsilon"}
FLOW_ASKED = {"prediction_type": "rectified_flow"}
ZERO_ASKED, PLAIN_ASKED = {"zero_terminal_snr": True}, {"zero_terminal_snr": False}

# Marker keys, metadata, options -> what is decided, or the words of the refusal, one for each side.
FILES = [
    ((), {}, {}, EPSILON),
    (("v_pred",), {}, {}, V),
    (("v_pred", "ztsnr"), {}, {}, ZERO),
    (("ztsnr",), {}, {}, (f"zero-terminal SNR ({ZTSNR} in ", "epsilon (nothing says otherwise)")),
    # Metadata, as kohya and ComfyUI write it.
    ((), EPS_DATA, {}, EPSILON),
    ((), V_DATA, {}, V),
    ((), V_COMFY, {}, V),
    ((), {"modelspec.prediction_type": "Velocity"}, {}, V),
    ((), {"ss_v_parameterization": "True"}, {}, V),
    ((), {"modelspec.prediction_type": "edm"}, {}, ("the base predicts edm", SPEC)),
    ((), {"modelspec.prediction_type": "edm"}, V_ASKED, V),
    ((), {"modelspec.prediction_type": "x0\u3042"}, {}, ("the base predicts x0\\u3042", SPEC)),
    ((), {"modelspec.predict_key": "score"}, EPS_ASKED, EPSILON),
    ((), V_DATA | {"ss_zero_terminal_snr": "True"}, {}, ZERO),
    ((), V_DATA | {"ss_zero_terminal_snr": "True"}, PLAIN_ASKED, V),
    (
        (),
        {"ss_zero_terminal_snr": "true"},
        {},
        ("zero-terminal SNR (ss_zero_terminal_snr", "epsilon (nothing says otherwise)"),
    ),
    ((), EPS_DATA | V_COMFY, {}, (f"epsilon by {SPEC}", f"v_prediction by {KEY}")),
    (("v_pred",), EPS_DATA, {}, (f"v_prediction by {V_PRED}", f"epsilon by {SPEC}")),
    (("ztsnr",), V_DATA, {}, ZERO),
    (("ztsnr",), EPS_DATA, {}, (f"zero-terminal SNR ({ZTSNR} in ", f"epsilon ({SPEC} ")),
    # The option prediction_type is stronger than metadata and no stronger than a marker.
    ((), {}, V_ASKED, V),
    ((), V_DATA | V_COMFY, EPS_ASKED, EPSILON),
    ((), EPS_DATA, V_ASKED, V),
    (("v_pred",), EPS_DATA, V_ASKED, V),
    (("v_pred",), {}, EPS_ASKED, (f"v_prediction by {V_PRED}", f"epsilon by {TYPE_OPTION}")),
    (("ztsnr",), {}, V_ASKED, ZERO),
    (("ztsnr",), {}, EPS_ASKED, (f"zero-terminal SNR ({ZTSNR} in ", f"epsilon ({TYPE_OPTION})")),
    # The option zero_terminal_snr.
    (("v_pred",), {}, ZERO_ASKED, ZERO),
    (("v_pred", "ztsnr"), {}, ZERO_ASKED, ZERO),
    (("v_pred", "ztsnr"), {}, PLAIN_ASKED, (f"true by {ZTSNR}", f"false by {ZERO_OPTION}")),
    ((), {}, ZERO_ASKED, (f"zero-terminal SNR ({ZERO_OPTION})", "epsilon (nothing says otherwise)")),
    ((), {}, ZERO_ASKED | V_ASKED, ZERO),
    ((), {}, ZERO_ASKED | EPS_ASKED, (f"zero-terminal SNR ({ZERO_OPTION})", f"epsilon ({TYPE_OPTION})")),
    ((), V_DATA, ZERO_ASKED, ZERO),
    # SwarmUI's name for v-prediction with zero-terminal SNR says both.
    ((), {"modelspec.prediction_type": "v-zsnr"}, {}, ZERO),
    ((), {"modelspec.prediction_type": "V-ZSNR"}, V_ASKED, ZERO),
    ((), {"modelspec.predict_key": "v-zsnr"}, PLAIN_ASKED, V),
    ((), {"modelspec.prediction_type": "v-zsnr"}, EPS_ASKED | PLAIN_ASKED, EPSILON),
    ((), {"modelspec.prediction_type": "v-zsnr"}, FLOW_ASKED, FLOW),
    ((), V_DATA | {"ss_zero_terminal_snr": "True"}, FLOW_ASKED, FLOW),
    # Rectified flows: what SwarmUI and SushiUI write, and what files of flows mostly say, which is epsilon.
    ((), {"modelspec.prediction_type": "sd3"}, {}, FLOW),
    ((), {"modelspec.prediction_type": "Rectified_Flow"}, {}, FLOW),
    ((), {"modelspec.noise_process": "flow", "modelspec.prediction_type": "velocity"}, {}, FLOW),
    ((), {"modelspec.noise_process": "ddpm", "modelspec.prediction_type": "velocity"}, {}, V),
    (
        (),
        {"modelspec.noise_process": "flow"} | EPS_DATA,
        {},
        (f"epsilon by {SPEC}", "rectified_flow by modelspec.noise"),
    ),
    ((), {"modelspec.noise_process": "flow"}, EPS_ASKED, EPSILON),
    ((), {}, FLOW_ASKED, FLOW),
    ((), EPS_DATA, FLOW_ASKED | {"flow_shift": 3.0}, SHIFTED),
    (("v_pred",), {}, FLOW_ASKED, (f"v_prediction by {V_PRED}", f"rectified_flow by {TYPE_OPTION}")),
    (("ztsnr",), {}, FLOW_ASKED, (f"zero-terminal SNR ({ZTSNR} in ", f"rectified_flow ({TYPE_OPTION})")),
    ((), {"modelspec.prediction_type": "flow"}, ZERO_ASKED, (f"({ZERO_OPTION})", f"rectified_flow ({SPEC}")),
    (("v_pred",), {}, {"flow_shift": 3.0}, ("flow_shift has no effect", f"v_prediction ({V_PRED}")),
    (
        (),
        {},
        {"flow_shift": 3.0},
        ("flow_shift has no effect", "epsilon (nothing says otherwise)", "prediction_type to"),
    ),
]


@pytest.mark.parametrize(("markers", "metadata", "options", "expected"), FILES)
def test_the_evidence_of_a_single_file(markers, metadata, options, expected):
    evidence = [*from_single_file(set(markers), "a file"), *from_metadata(metadata, "a file")]
    asked = [options.get(name) for name in ("prediction_type", "zero_terminal_snr", "flow_shift")]
    if isinstance(expected, Prediction):
        assert decide(evidence, *asked) == expected
    else:
        message = refusal(decide, evidence, *asked)
        assert all(words in message for words in expected)


FLOW_NAMES = [
    *("NoobAI-RectifiedFlow-Experimental", "ChenkinNoob_RF_v0.2", "NoobRF", "noob-rf", "flow_matching_xl", "SDXL Flow"),
    *("bigaspV2.5", "bigASP_v25", "bigasp-2-5", "nai-v2-fm-alpha", "nyaflow-xl"),
]
OTHER_NAMES = [
    "bigasp_v20",
    "flowers",
    "DreamFlower2",
    "overflow",
    "scarf",
    "SURF",
    "performance",
    "PERF_XL",
    "noobaiVPred",
]


def test_a_name_of_a_flow_is_not_taken_for_epsilon_without_asking():
    for name in FLOW_NAMES:
        with case(name):
            hints = from_names(f"{name}.safetensors", {})
            words = refusal(decide, hints)
            assert (
                name in words and "nothing in it says so: set prediction_type to rectified_flow, or to epsilon" in words
            )
            for weak in (EPS_DATA, V_DATA):
                said = [*from_metadata(weak, "it"), *hints]
                assert f"{SPEC} it says {said[0].type}, as trainers of flows write" in refusal(decide, said)
                assert decide(said, "rectified_flow") == FLOW and decide(said, "epsilon") == EPSILON
            assert decide([*from_metadata({"modelspec.prediction_type": "flow"}, "it"), *hints]) == FLOW
            assert decide([*from_single_file({"v_pred"}, "it"), *hints]) == V
            assert refusal(decide, from_names("model.safetensors", {"modelspec.title": name})).startswith("the title")
    for name in OTHER_NAMES:
        assert from_names(f"{name}.safetensors", {"modelspec.title": name}) == [], name


@ONE
def test_a_single_file_is_read_for_all_of_it(of_file):
    assert of_file(("v_pred",), V_DATA, **ZERO_ASKED).prediction == ZERO
    assert f"epsilon by {SPEC}" in refusal(of_file, ("v_pred",), EPS_DATA)
    assert f"epsilon by {TYPE_OPTION}" in refusal(of_file, ("v_pred",), **EPS_ASKED)
    assert f"false by {ZERO_OPTION}" in refusal(of_file, ("v_pred", "ztsnr"), **PLAIN_ASKED)


@ONE
def test_the_markers_are_among_the_ignored_keys(architecture, of_file):
    base = of_file(("v_pred", "ztsnr"))
    assert base.prediction == ZERO and set(base.ignored) >= {"v_pred", "ztsnr"}


@ONE
@pytest.mark.slow
def test_names_like_the_markers_are_none(architecture, of_file):
    for name in ("model.v_pred", "V_PRED", "v_prediction"):
        assert name in refusal(of_file, (name,))


def test_metadata_without_a_type_says_nothing():
    for value in ("", "none", "None", "\n"):
        assert from_metadata(dict.fromkeys(("modelspec.prediction_type", "modelspec.predict_key"), value), "it") == []


# --- folders ---

FLOW_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "prediction_type": None}
SOLVER = {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}
FOLDERS = [
    ({}, {}, EPSILON),
    ({"prediction_type": None, "rescale_betas_zero_snr": None}, {}, EPSILON),
    ({"prediction_type": "v_prediction"}, {}, V),
    ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {}, ZERO),
    ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, {}, ("zero-terminal SNR (", "epsilon (", CONFIG)),
    ({"rescale_betas_zero_snr": True, "prediction_type": None}, {}, ("zero-terminal SNR (", "epsilon (", CONFIG)),
    ({"prediction_type": "sample"}, {}, ("predicts sample (", CONFIG)),
    # Options agree with the config or contradict it; there is nothing weak in a folder.
    ({}, EPS_ASKED | PLAIN_ASKED, EPSILON),
    ({"prediction_type": "v_prediction"}, V_ASKED | PLAIN_ASKED, V),
    ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, V_ASKED | ZERO_ASKED, ZERO),
    ({}, V_ASKED, ("epsilon by ", CONFIG, f"v_prediction by {TYPE_OPTION}")),
    ({"prediction_type": "v_prediction"}, EPS_ASKED, ("v_prediction by ", CONFIG, f"epsilon by {TYPE_OPTION}")),
    ({"prediction_type": "sample"}, EPS_ASKED, ("sample by ", CONFIG, f"epsilon by {TYPE_OPTION}")),
    ({"prediction_type": "v_prediction"}, ZERO_ASKED, ("false by ", CONFIG, f"true by {ZERO_OPTION}")),
    (
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        PLAIN_ASKED,
        ("true by ", CONFIG, f"false by {ZERO_OPTION}"),
    ),
    # Rectified flows. What a scheduler carries of the one that it was made from is evidence too.
    (FLOW_SCHEDULER, {}, SHIFTED),
    (FLOW_SCHEDULER | {"shift": None}, FLOW_ASKED, FLOW),
    (FLOW_SCHEDULER, {"flow_shift": 2.5}, Prediction("rectified_flow", shift=2.5)),
    (FLOW_SCHEDULER | {"_class_name": "FlowMatchHeunDiscreteScheduler"}, {}, SHIFTED),
    (FLOW_SCHEDULER | {"prediction_type": "flow_prediction"}, PLAIN_ASKED, SHIFTED),
    (
        FLOW_SCHEDULER | {"prediction_type": "epsilon"},
        {},
        ("by the class FlowMatchEuler", "epsilon by prediction_type"),
    ),
    (FLOW_SCHEDULER | {"rescale_betas_zero_snr": True}, {}, ("zero-terminal SNR (", "rectified_flow (the class Flow")),
    (FLOW_SCHEDULER, EPS_ASKED, ("rectified_flow by the class Flow", CONFIG, f"epsilon by {TYPE_OPTION}")),
    (FLOW_SCHEDULER, ZERO_ASKED, ("false by ", f"true by {ZERO_OPTION}")),
    (SOLVER | {"prediction_type": "flow_prediction", "flow_shift": 3.0}, {}, SHIFTED),
    (SOLVER | {"prediction_type": "flow_prediction"}, {}, FLOW),
    (SOLVER, {}, ("epsilon by ", CONFIG, "rectified_flow by use_flow_sigmas in ")),
    (
        SOLVER | {"prediction_type": "v_prediction"},
        FLOW_ASKED,
        ("v_prediction by ", "rectified_flow by use_flow_sigmas"),
    ),
    (SOLVER | {"use_flow_sigmas": False, "flow_shift": 3.0}, {}, EPSILON),
    ({}, FLOW_ASKED, ("epsilon by ", CONFIG, f"rectified_flow by {TYPE_OPTION}")),
    (None, FLOW_ASKED | {"flow_shift": 3.0}, SHIFTED),
    # Without a scheduler config the user has to say it: nothing is assumed of a folder.
    (None, {}, (CONFIG, "--model.prediction_type")),
    (None, EPS_ASKED, EPSILON),
    (None, V_ASKED | ZERO_ASKED, ZERO),
]


@ONE
@pytest.mark.parametrize(("changes", "options", "expected"), FOLDERS)
def test_a_folder(changes, options, expected, of_folder):
    if isinstance(expected, Prediction):
        assert of_folder(changes, **options).prediction == expected
    else:
        message = refusal(of_folder, changes, **options)
        assert all(words in message for words in expected)


@ONE
def test_the_refusal_names_the_path_of_what_contradicts(of_folder, of_file, tmp_path):
    assert str(tmp_path / "base" / CONFIG) in refusal(of_folder, {}, **V_ASKED)
    assert refusal(of_file, ("v_pred",), EPS_DATA).count(str(tmp_path / "model.safetensors")) == 2


@ONE
@pytest.mark.parametrize("options", [V_ASKED, ZERO_ASKED | V_ASKED])
def test_what_comes_from_elsewhere_says_nothing_of_the_base(options, of_file, folders, architecture):
    """The scheduler next to a VAE or text encoders is not the base's: theirs say epsilon, without an error here."""
    elsewhere = {"vae": str(folders[architecture]), "text_encoders": str(folders[architecture])}
    assert of_file(("v_pred",), **elsewhere, **options).prediction.type == "v_prediction"


# --- the decision by itself ---


def test_nothing_said_is_epsilon_on_the_usual_schedule():
    assert decide([]) == decide([Evidence("somewhere")]) == EPSILON


def test_the_first_two_that_differ_are_shown():
    said = [Evidence("a", "epsilon"), Evidence("b", "epsilon"), Evidence("c", "v_prediction"), Evidence("d", "sample")]
    message = refusal(decide, said)
    assert "epsilon by a, but v_prediction by c" in message and "sample" not in message


def test_the_order_of_evidence_does_not_decide():
    said = [
        *from_scheduler({"prediction_type": "v_prediction"}, "config"),
        *from_metadata(V_DATA, "file"),
        Evidence("marker", "v_prediction"),
    ]
    assert decide(said) == decide(said[::-1]) == V
    for order in (said, said[::-1]):
        assert "epsilon by the option" in refusal(decide, order, "epsilon")
    weak = [*from_metadata(EPS_DATA, "file"), Evidence("marker", "v_prediction")]
    for order in (weak, weak[::-1]):
        message = refusal(decide, order)
        assert "epsilon by modelspec" in message and "v_prediction by marker" in message
        assert decide(order, "v_prediction") == V


def test_weak_evidence_gives_way_to_the_option_of_the_type_alone():
    weak = from_metadata(V_DATA, "file")
    assert decide(weak, asked_zero=True) == ZERO
    assert decide(weak, asked_zero=False) == V


# --- what is made of it ---


def predicting(predicted, of_file):
    return of_file(("v_pred",) * (predicted != EPSILON) + ("ztsnr",) * predicted.zero_terminal_snr)


@ONE
@ALL
@pytest.mark.slow
def test_training_and_sampling_follow_the_base(predicted, architecture, of_file):
    base = predicting(predicted, of_file)
    assert base.prediction == predicted
    scheduler = pipeline.sampling_scheduler(base.scheduler, base.prediction, 20)
    assert scheduler.config.prediction_type == predicted.type
    assert scheduler.config.rescale_betas_zero_snr is predicted.zero_terminal_snr
    abar = objectives.alphas_cumprod(zero_terminal_snr=base.prediction.zero_terminal_snr)
    assert torch.equal(scheduler.alphas_cumprod[:-1], abar[:-1])
    assert (abar[-1] == 0) == predicted.zero_terminal_snr
    assert scheduler.alphas_cumprod[-1] == (2**-24 if predicted.zero_terminal_snr else abar[-1])


@ONE
@ALL
@pytest.mark.slow
def test_pictures_are_generated_with_the_base_s_prediction(predicted, architecture, of_file, monkeypatch):
    base, given = predicting(predicted, of_file), []

    class Enough(Exception):
        pass

    def scheduler(*arguments):
        given.extend(arguments)
        raise Enough

    monkeypatch.setattr(pipeline, "sampling_scheduler", scheduler)
    size = {"steps": 1, "guidance": 1.0, "height": 64, "width": 64}
    with pytest.raises(Enough):
        list(pipeline.generate_latents(MODELS[architecture], base, None, [{}], {}, seeds=[0], **size))
    assert given == [base.scheduler, predicted, 1]


def test_the_description_of_each():
    assert [each.describe() for each in (EPSILON, V, ZERO, FLOW, Prediction("rectified_flow", shift=2.5))] == [
        "epsilon",
        "v_prediction",
        "v_prediction, zero-terminal SNR",
        "rectified_flow, shift 1",
        "rectified_flow, shift 2.5",
    ]


def test_what_is_hashed_of_the_others_is_what_it_was_before_flows():
    assert EPSILON.facts() == {"type": "epsilon", "zero_terminal_snr": False}
    assert ZERO.facts() == {"type": "v_prediction", "zero_terminal_snr": True}
    assert list(SHIFTED.facts().values()) == ["rectified_flow", False, 3.0] != list(FLOW.facts().values())
