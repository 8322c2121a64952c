"""Tells what a model is, before anything is trained on it: architecture, what it predicts, components, what lacks, hash.

    python scripts/inspect_model.py ponyDiffusionV6XL.safetensors
    python scripts/inspect_model.py stabilityai/stable-diffusion-xl-base-1.0

It takes a .safetensors file, a folder in diffusers format, or a hub id of either. Only a file's header is read, but for the
hash, which comes last.
"""

from __future__ import annotations

import argparse

if __name__ == "__main__":
    PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    PARSER.add_argument("model", help="a .safetensors file, a folder in diffusers format, or a hub id")
    CONFIG = PARSER.parse_args()

import logging
import textwrap

from sushi_research.config.command_line import run_main
from sushi_research.models import hub, inspection

WIDTH = 21


def main(config: argparse.Namespace) -> int:
    """Prints what `config.model` is, line by line as it is found out; returns 0."""
    # diffusers imports it, and it tells of a kernel that is not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    path, _ = hub.locate_base(config.model, None, "the model")
    for title, text in inspection.describe(path, config.model):
        lines = textwrap.wrap(text, 120 - WIDTH, break_on_hyphens=False) or [""]
        print(f"{title:<{WIDTH}}" + f"\n{'':<{WIDTH}}".join(lines), flush=True)
    return 0


if __name__ == "__main__":
    run_main(main, CONFIG)
