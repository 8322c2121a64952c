"""The drawn world: what the captions say, what is held out, and that a drawing is a function of its scene."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from demo.concepts import CONCEPTS, PHOTOS, PRIOR_FROM, known_scenes, write_photos
from demo.drawing import (
    COUNTS,
    DISHES,
    KINDS,
    SQUARE,
    TALL,
    TOPPINGS,
    WIDE,
    Jitter,
    Scene,
    all_scenes,
    draw,
    is_held_out,
)
from demo.measure import KNOWN_PROMPTS
from sushi_research.config.yaml12 import read_yaml
from sushi_research.data.buckets import BucketRule, crop_geometry


def every_scene() -> list[Scene]:
    """The bases' world and all that the concepts add to it."""
    return list(dict.fromkeys(all_scenes() + [scene for concept in CONCEPTS.values() for scene in concept.scenes]))


def test_captions_name_scenes_one_to_one() -> None:
    scenes = every_scene()
    captions = [scene.caption for scene in scenes]
    assert len(set(captions)) == len(captions) > 1300
    assert [Scene.from_caption(caption) for caption in captions] == scenes
    assert Scene("egg", "maki", "wooden board", 2).caption == "two egg maki on a wooden board"
    assert Scene("tuna", "nigiri", "blue plate", style="night").caption == "one tuna nigiri on a blue plate, at night"


@pytest.mark.parametrize(
    "caption", ["", "a cat", "three egg maki on a blue plate", "one egg maki on a blue plate, at noon"]
)
def test_other_sentences_name_none(caption: str) -> None:
    assert Scene.from_caption(caption) is None


def test_held_out_scenes_are_made_of_words_that_were_seen() -> None:
    held_out = [scene for scene in all_scenes() if is_held_out(scene)]
    assert len(all_scenes()) == 624 and len(held_out) == 78
    for word, values in {"topping": TOPPINGS, "kind": KINDS, "dish": DISHES, "count": COUNTS}.items():
        seen = {getattr(scene, word) for scene in all_scenes() if not is_held_out(scene)}
        assert seen == set(values)
        assert len({getattr(scene, word) for scene in held_out}) == len(seen), f"every {word} is asked for"


def test_no_two_scenes_look_alike() -> None:
    pictures = {draw(scene, zoom=0.5).tobytes() for scene in every_scene()}
    assert len(pictures) == len(every_scene())


@pytest.mark.parametrize("canvas", [SQUARE, WIDE, TALL])
def test_a_drawing_is_a_function_of_its_arguments(canvas: tuple[int, int]) -> None:
    scene = Scene("salmon", "temaki", "red tray", 2)
    jitter = Jitter.random(np.random.default_rng(3))
    assert draw(scene, canvas, jitter=jitter).tobytes() == draw(scene, canvas, jitter=jitter).tobytes()
    assert draw(scene, canvas, jitter=jitter).tobytes() != draw(scene, canvas).tobytes()
    assert draw(scene, canvas, zoom=2.0).size == (2 * canvas[0], 2 * canvas[1])


@pytest.mark.parametrize("concept", CONCEPTS.values(), ids=CONCEPTS)
def test_the_photos_in_the_repository_are_what_the_code_draws(concept, tmp_path) -> None:
    write_photos(concept, tmp_path)
    drawn = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    kept = sorted(path.relative_to(PHOTOS / concept.name) for path in (PHOTOS / concept.name).rglob("*.*"))
    assert drawn == kept and len(drawn) == 2 * (concept.trained + concept.prior)
    for name in drawn:
        if name.suffix == ".txt":
            assert (tmp_path / name).read_text() == (PHOTOS / concept.name / name).read_text()
        else:
            # Not the bytes: another build of Pillow may compress otherwise. JPEG and WebP decoders differ by a level or two.
            with Image.open(tmp_path / name) as new, Image.open(PHOTOS / concept.name / name) as old:
                assert new.size == old.size
                assert np.abs(np.asarray(new.convert("RGB"), int) - np.asarray(old.convert("RGB"), int)).mean() < 1


@pytest.mark.parametrize("concept", CONCEPTS.values(), ids=CONCEPTS)
def test_what_a_concept_trains_on_and_what_it_is_evaluated_by(concept) -> None:
    trained = set(concept.training_scenes())
    assert len(trained) == concept.trained >= 12
    assert trained.isdisjoint(concept.unseen_scenes(32)) and len(concept.unseen_scenes(32)) == 32
    photos = [path for path in (PHOTOS / concept.name).rglob("*") if path.suffix in (".png", ".jpg", ".webp")]
    sizes = {Image.open(path).size for path in photos}
    assert len(sizes) >= 4 and {path.suffix for path in photos} == {".png", ".jpg", ".webp"}
    evaluated = known_scenes(KNOWN_PROMPTS)
    assert not any(is_held_out(scene) for scene in evaluated)
    assert set(evaluated).isdisjoint(known_scenes(concept.prior, start=PRIOR_FROM)), (
        "what was kept is not what was repeated"
    )


@pytest.mark.parametrize("concept", CONCEPTS.values(), ids=CONCEPTS)
def test_the_demo_asks_for_what_no_photo_shows(concept) -> None:
    root = PHOTOS.parents[1]
    prompts = read_yaml(str(root / f"configs/demo/{concept.name}.yaml"))["sample"]["prompts"]
    asked = [Scene.from_caption(prompt) for prompt in prompts]
    assert None not in asked
    assert set(asked).isdisjoint(concept.training_scenes())
    assert sum(scene in concept.scenes for scene in asked) == 4


def test_the_bases_shapes_are_the_demos_buckets() -> None:
    """128x128 in steps of 32: photos of every shape land in a bucket that the bases were trained on."""
    rule = BucketRule(resolution=128, step=32, min_side=64, max_side=256)
    found = {
        (at.width, at.height) for at in (crop_geometry(*size, rule) for size in [(192, 192), (240, 144), (144, 240)])
    }
    assert found == {SQUARE, WIDE, TALL}
