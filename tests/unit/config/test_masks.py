"""Keys of masks that have no effect in a set are refused by name."""

import pytest
from pydantic import ValidationError

from sushi_research.config import SDXLTraining


@pytest.mark.parametrize(
    ("masks", "key"),
    [
        ({"background": 0.5}, "background has no effect while data.sets[0].masks.source is none"),
        ({"source": "alpha", "folder": "masks"}, "folder has no effect while data.sets[0].masks.source is alpha"),
        ({"source": "files", "column": "mask"}, "column has no effect while data.sets[0].masks.source is files"),
        ({"source": "files", "folder": "masks", "invert": True}, None),
        ({"source": "none"}, None),
    ],
)
def test_a_key_of_a_set_s_masks_without_effect_is_refused(masks, key):
    sections = {"model": {"base": "base"}, "train": {"steps": 1}}
    config = {**sections, "data": {"sets": [{"path": "photos", "masks": masks}]}}
    if key is None:
        SDXLTraining(**config)
        return
    with pytest.raises(ValidationError) as error:
        SDXLTraining(**config)
    assert f"data.sets[0].masks.{key}" in str(error.value)
