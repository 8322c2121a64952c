"""The scores of a run that learned the demo's `night`: those of demo.measure, and how wrong the brightness of its pictures is.

python -m demo.night RUN    # scores the adapter of a finished run into RUN/scores.json (demo/scoring.py)

The checker takes a night picture that is a little too light for "none of these", so right or wrong alone does not tell a picture
that is nearly dark from one in daylight.
"""

from __future__ import annotations

import sys

import numpy as np
from PIL import Image

from demo import scoring
from demo.drawing import Scene, draw
from demo.measure import CONCEPT_PROMPTS, KNOWN_PROMPTS, checker_of


def brightness_error(picture: Image.Image, scene: Scene) -> float:
    """How far the mean of the picture is from that of the drawing of its scene, on the scale 0 (black) to 1 (white)."""
    return abs(_brightness(picture) - _brightness(draw(scene, picture.size)))


def _brightness(picture: Image.Image) -> float:
    return float(np.asarray(picture.convert("L"), dtype=np.float64).mean() / 255)


MEASURES = {"brightness error": scoring.Measure(brightness_error, "lower")}

if __name__ == "__main__":
    scoring.main(sys.argv[1:], (CONCEPT_PROMPTS, KNOWN_PROMPTS), checker_of, MEASURES)
