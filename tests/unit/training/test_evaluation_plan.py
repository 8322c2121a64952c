"""What the plan says about the images that a run is evaluated on."""

from dataclasses import replace
from types import SimpleNamespace

from sushi_research.config import SD15Training
from sushi_research.config.sets import sets_of
from sushi_research.data import near_search
from sushi_research.data.buckets import BucketRule
from sushi_research.data.items import Items, make_items
from sushi_research.data.samples import Sample
from sushi_research.data.training_data import Data
from sushi_research.training.evaluation_plan import plan_evaluation
from sushi_research.training.length import interval_of

EVERY_250 = interval_of(250, 500, 17, 1)


def items(*numbers: int) -> Items:
    samples = [Sample(f"{n}.png", f"{n:032x}", f"photo {n}", 64, 64, 1, bytes) for n in numbers]
    return make_items(samples, BucketRule(resolution=64, step=32, min_side=32, max_side=128))[0]


def test_it_says_how_many_images_were_asked_for_and_how_many_are_held_out():
    config = SD15Training.model_validate(
        {"model": {"base": "b"}, "data": {"path": "photos"}, "train": {"steps": 9}, "evaluation": {"held_out": 0.25}}
    )
    near = [f"{n}.png resembles another" for n in range(7)]
    of_prior = items(*range(24, 36))
    data = Data(
        items(*range(17), *range(24, 36)),
        None,
        items(*range(17, 20)),
        near,
        prior=items(*range(20, 24)),
        trained=items(*range(3)),
    )
    data = replace(data, prior_trained=frozenset(item.sample.image_hash for item in of_prior))
    found = plan_evaluation(config, SimpleNamespace(data=data), 500, EVERY_250)
    assert found.describe() == [
        "evaluation   3 images x 8 noise samples, and the drift on 16 captions, 3 times",
        "             images: held out of photos (asked for 0.25 of 20 images without the prior ones, which is 5; got 3)",
        "             what is kept is measured on the base's own images of these captions and 4 prior images, held out of training",
        "             what is memorised is measured on 3 training images",
        "             a test result between runs needs 8 images or more",
        *(f"             warning: {n}.png resembles another" for n in range(5)),
        "             and 2 more (a run's plan.json lists all)",
    ]
    assert plan_evaluation(config, SimpleNamespace(data=Data(items(*range(3)), None)), 500, EVERY_250) is None


def test_regularisation_images_are_none_that_are_held_out_of():
    evaluation = {"held_out": 0.25, "drift_captions": []}
    sets = [{"path": "class", "role": "regularisation"}, {"path": "mine"}]
    config = SD15Training.model_validate(
        {"model": {"base": "b"}, "data": {"sets": sets}, "train": {"steps": 9}, "evaluation": evaluation}
    )
    samples = [Sample(f"{n}.png", f"{n:032x}", "a", 64, 64, 1, bytes, set=int(n < 6)) for n in range(20)]
    used, _ = make_items(samples, BucketRule(resolution=64, step=32, min_side=32, max_side=128))
    data = Data(used, None, items(20, 21), sets=sets_of(config))
    line = plan_evaluation(config, SimpleNamespace(data=data), 500, EVERY_250).describe()[1]
    assert line.endswith("images: held out of mine (asked for 0.25 of 8 images, which is 2; got 2)")


def test_it_says_why_fewer_of_many_images_are_held_out(monkeypatch):
    monkeypatch.setattr(near_search, "MOST_GROUPED", 19)
    config = SD15Training.model_validate(
        {"model": {"base": "b"}, "data": {"path": "photos"}, "train": {"steps": 9}, "evaluation": {"held_out": 0.25}}
    )
    for got, why in (
        (3, ", because of more than 4,096 images at most 1,000 are compared with the others, and "),
        (5, ""),
    ):
        data = Data(items(*range(20 - got)), None, items(*range(20 - got, 20)))
        line = plan_evaluation(config, SimpleNamespace(data=data), 500, EVERY_250).describe()[1]
        assert f"which is 5; got {got}{why}" in line and line.endswith(f"got {got})") == (not why)


def test_it_says_which_pictures_are_generated():
    sections = {"model": {"base": "b"}, "data": {"path": "photos"}, "train": {"steps": 9}}
    evaluation = {"held_out": 0.25, "pictures": 5, "drift_captions": ["a", "b", "photo 3"]}
    config = SD15Training.model_validate(sections | {"evaluation": evaluation})
    inputs = SimpleNamespace(data=Data(items(*range(17)), None, [*items(*range(17, 20)), *items(17, 18)]))
    [line] = [line for line in plan_evaluation(config, inputs, 500, EVERY_250).describe() if "pictures of" in line]
    assert line == (
        "             pictures of 3 held-out captions (compared with the images) and 2 drift captions (compared with the base's "
        "pictures), 3 times"
    )


def test_it_says_what_the_best_adapter_is_chosen_from():
    def lines_of(every: int | None) -> list[str]:
        evaluation = {"held_out": 0.25, "keep_best": True}
        settings = {"model": {"base": "b"}, "data": {"path": "photos"}, "evaluation": evaluation}
        config = SD15Training.model_validate(settings | {"train": {"steps": 9}})
        data = Data(items(*range(17)), None, items(*range(17, 20)), [], trained=items(*range(3)))
        return plan_evaluation(config, SimpleNamespace(data=data), 9, interval_of(every, 9, 17, 1)).describe()

    assert "             the adapter of the best of 3 evaluations is kept, as NAME-best-STEP.safetensors" in lines_of(4)
    assert [
        line
        for line in lines_of(None)
        if "evaluation.keep_best has no choice: the only evaluation after step 0" in line
    ]
