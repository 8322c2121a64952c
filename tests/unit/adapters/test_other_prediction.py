"""What is said of adapter files that were trained on a base that predicts something else."""

import torch
from safetensors.torch import save_file

from sushi_research.adapters.other_prediction import notes
from sushi_research.models.prediction import Prediction

EPSILON, V, FLOW = Prediction(), Prediction("v_prediction"), Prediction("rectified_flow", shift=3.0)


def written(folder, name, **metadata):
    save_file({"x": torch.zeros(1)}, folder / name, {"modelspec.prediction_type": "epsilon"} | metadata)
    return folder / name


def test_an_adapter_may_know_more_of_a_base_than_the_base_s_file(tmp_path):
    flow = written(tmp_path, "flow.safetensors", **{"modelspec.prediction_type": "rectified_flow"})
    v = written(tmp_path, "v.safetensors", **{"modelspec.prediction_type": "v", "ss_v_parameterization": "True"})
    [note] = notes([flow], EPSILON)
    assert f"{flow} says that the base it was trained on predicts rectified_flow" in note
    assert "taken to predict epsilon: set prediction_type to rectified_flow if" in note
    assert len(notes([flow, v], EPSILON)) == 2 and not notes([flow], FLOW) and not notes([v], V)
    # Other trainers write epsilon for every base, and nothing is read out of a contradiction.
    plain = written(tmp_path, "plain.safetensors")
    unclear = written(tmp_path, "unclear.safetensors", ss_v_parameterization="True")
    assert not notes([plain, unclear], V) and not notes([plain, unclear], FLOW)
