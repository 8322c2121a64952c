"""Identities of other versions: a key that is new has its default, and what cannot be told is answered with a sentence."""

from types import SimpleNamespace

import pytest
from pydantic import Field

from sushi_research import models
from sushi_research.config import SD15Training
from sushi_research.config.command_line import NEVER_STORED, config_to_dict
from sushi_research.config.keys import default_values
from sushi_research.config.loss import LossSection
from sushi_research.config.renamed_keys import RENAMED
from sushi_research.errors import UserError
from sushi_research.runs.decision import decide
from sushi_research.runs.identity import (
    compare_identity,
    default_name,
    flatten,
    in_this_version,
    require_same_run,
    run_identity,
)

FACTS = {"global_batch_size": 4, "precision": "bf16", "data": "d"}
SECTIONS = {"model": {"base": "base"}, "data": {"path": "photos"}, "train": {"steps": 100}}


class LaterLoss(LossSection):
    huber: float | None = Field(None, description="A setting that a later version adds")


class LaterTraining(SD15Training):
    """The config of a later version, with one more key."""

    loss: LaterLoss = Field(default_factory=LaterLoss)


NOW, LATER = default_values(SD15Training), default_values(LaterTraining)


def identity(config_class=SD15Training, facts=FACTS, **sections):
    return run_identity(config_to_dict(config_class(**SECTIONS | sections)), facts)


@pytest.mark.parametrize("config_class", [*models.config_classes().values(), LaterTraining])
def test_the_defaults_are_those_of_a_config_that_sets_nothing(config_class):
    settings = flatten(config_to_dict(config_class(**SECTIONS)))
    defaults = {key: value for key, value in default_values(config_class).items() if key not in flatten(SECTIONS)}
    for mapping in ("optimizer.kwargs", "captions.replace", "captions.tag_categories"):
        assert defaults.pop(mapping) == {}
    for never_stored in NEVER_STORED:
        assert defaults.pop(never_stored) is None
    assert defaults == {key: value for key, value in settings.items() if key not in flatten(SECTIONS)}


def test_a_key_that_a_later_version_adds_has_its_default():
    old, at_default, changed = identity(), identity(LaterTraining), identity(LaterTraining, loss={"huber": 0.1})
    assert "loss.huber" not in old and "loss.huber" in at_default
    require_same_run("trial", in_this_version(old, LATER), at_default)
    with pytest.raises(UserError, match=r"settings: loss.huber was null, is now 0.1; "):
        require_same_run("trial", in_this_version(old, LATER), changed)
    # The run, and its checkpoint, are continued.
    old = in_this_version(old, LATER)
    record = {"identity": old, "steps": 100, "finished_at": None}
    checkpoint = SimpleNamespace(step=40, facts={"identity": old})
    assert decide("trial", record, checkpoint, at_default, 100).action == "continue"
    with pytest.raises(UserError, match="loss.huber was null, is now 0.1"):
        decide("trial", record, checkpoint, changed, 100)


def test_a_key_that_this_version_does_not_have_is_refused_by_name():
    newer = identity(LaterTraining, optimizer={"kwargs": {"eps": 1e-8}})
    for value in (None, 0.1):
        with pytest.raises(
            UserError, match=r"loss.huber was \S+, and this version has no such setting; optimizer.kwargs"
        ) as at:
            require_same_run("trial", in_this_version(newer | {"loss.huber": value}, NOW), identity())
        assert "optimizer.kwargs.eps was 1e-08, is now (not there)" in str(at.value), "any version has that mapping"


def test_a_renamed_key_and_one_that_may_change_by_now(monkeypatch):
    monkeypatch.setitem(RENAMED, "lora.width", "lora.rank")
    old = {key: value for key, value in identity().items() if key != "lora.rank"}
    old |= {"lora.width": 32, "train.attention": "xformers"}
    assert [change[:] for change in compare_identity(in_this_version(old, NOW), identity())] == [("lora.rank", 32, 16)]
    assert in_this_version(old, NOW)["lora.rank"] == 32
    require_same_run("trial", in_this_version(old, NOW), identity(lora={"rank": 32}))


def test_a_fact_that_only_one_has_is_refused_by_name():
    """Nothing says what the other version would have found."""
    old, new = identity(), identity()
    with pytest.raises(UserError, match=r"samples_per_step \(a fact of another version\) was 4, is now \(not there\)"):
        require_same_run("trial", in_this_version(old | {"facts.samples_per_step": 4}, NOW), new)
    with pytest.raises(UserError, match=r"random_scheme \(version of .*\) was \(not there\), is now 1"):
        require_same_run("trial", in_this_version(old, NOW), identity(facts=FACTS | {"random_scheme": 1}))


def test_the_name_of_a_run_does_not_change_with_a_new_key():
    def name(defaults, config_class=SD15Training, **sections):
        return default_name("sd15", "photos", identity(config_class, **sections), defaults)

    plain = name(NOW)
    assert name(LATER, LaterTraining) == plain == name(NOW, lora={"rank": 16})
    others = [
        name(LATER, LaterTraining, loss={"huber": 0.1}),
        name(NOW, lora={"rank": 8}),
        name(NOW, model={"base": "b"}),
    ]
    kwargs = [name(NOW, optimizer={"kwargs": {"eps": eps}}) for eps in (1e-8, 1e-6)]
    assert len({plain, *others, *kwargs}) == 6
