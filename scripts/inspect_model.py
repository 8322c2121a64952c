"""Shows what a model is before you train on it (architecture, prediction type, components, what is missing, hash), and what an
adapter file holds (modules, ranks, scales, norms by block, metadata).

    python scripts/inspect_model.py ponyDiffusionV6XL.safetensors
    python scripts/inspect_model.py stabilityai/stable-diffusion-xl-base-1.0

It takes a .safetensors file, a folder in diffusers format, or a hub id of either. Of a base it reads only the header; the hash,
which comes last, reads everything. Of an adapter it checks every value. The exit status is 0 if the file can be used: the model
trained on as it is (the last line but the hash is then the command), the adapter evaluated and sampled. Else it is 2, and a
sentence says what is wrong or what has to be given with it.
"""

from __future__ import annotations

import argparse

from sushi_research.config.arguments import Parser
from sushi_research.config.process import begin, run_main

if __name__ == "__main__":
    begin()
    PARSER = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    PARSER.add_argument("model", help="a .safetensors file, a folder in diffusers format, or a hub id")
    CONFIG = PARSER.parse_args()

import logging
import textwrap

from sushi_research import stopping
from sushi_research.adapters import reading
from sushi_research.adapters.tools import inspecting
from sushi_research.models import hub, inspection
from sushi_research.terminal import say

WIDTH = 21


def main(config: argparse.Namespace) -> int:
    """Prints the facts about `config.model`, each line as soon as it is known; returns 0 if it can be used.

    UserError, after the facts, says why it cannot.
    """
    with stopping.doing("reading the model", "nothing is written; the same command again starts over"):
        show(config.model)
    return 0


def show(model: str) -> None:
    """Prints the facts about a model."""
    # diffusers imports bitsandbytes, which warns about a missing kernel that is not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    path, _ = hub.locate_base(model, None, "the model")
    adapter = path.is_file() and reading.is_adapter(path)
    for title, text in inspecting.describe(path) if adapter else inspection.describe(path, model):
        wrapped = [] if title == inspection.COMMAND else textwrap.wrap(text, 120 - WIDTH, break_on_hyphens=False)
        lines = wrapped or [text]
        say(*(f"{'' if number else title:<{WIDTH}}{line}" for number, line in enumerate(lines)))


if __name__ == "__main__":
    run_main(main, CONFIG)
