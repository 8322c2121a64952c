"""Uploads the adapter of a run to the Hugging Face hub, with a model card that is made from the run folder.

    hf auth login
    python scripts/push_to_hub.py runs/mycat mycat --card         # prints the card, and uploads nothing
    python scripts/push_to_hub.py runs/mycat mycat                # to YOU/mycat, which is private if it is new
    python scripts/push_to_hub.py runs/mycat@250 team/mycat --public

The card has the base, trigger words, sample pictures with their prompts, settings, and what was measured; with `lora.metadata`
minimal or none only what programs need to load the file. The licence is left to you: add `license:` on the hub, and later uploads
keep it. What is uploaded is one commit. `--run.push_to_hub` of a training does the same at its end (docs/hub.md).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from sushi_research.config.arguments import Parser
from sushi_research.config.outputs import HUB_REPOSITORY
from sushi_research.config.process import begin, run_main


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder (runs/mycat), or one and a step (runs/mycat@250, @best, @ema)")
    parser.add_argument("repository", help="owner/name, or a name for a repository of your own")
    parser.add_argument(
        "--public", action="store_true", help="make a new repository public; one that is there stays as it is"
    )
    parser.add_argument("--card", action="store_true", help="print the model card, and upload nothing")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    begin()
    CONFIG = parse(sys.argv[1:])

from sushi_research import stopping
from sushi_research.adapters import run_files
from sushi_research.errors import UserError
from sushi_research.reports import hub_push
from sushi_research.terminal import say
from sushi_research.training import hub_upload


def main(config: argparse.Namespace) -> int:
    """Uploads, or prints the card; returns 0. UserError if it is no run, or the hub refuses it."""
    run = run_files.run_folder_of(config.run)
    if run is None:
        raise UserError(
            f"{config.run} is not a run folder, from which the model card is made: give runs/NAME or runs/NAME@STEP."
        )
    if not re.fullmatch(HUB_REPOSITORY, config.repository):
        raise UserError(f"{config.repository} is no name of a repository: give owner/name, or a name.")
    adapter = run_files.resolve(config.run)
    if config.card:
        text, _ = hub_push.merged(None, hub_push.model_card(run, adapter, config.repository))
        say(*str(text).splitlines())
        return 0
    with stopping.doing(f"uploading to {config.repository}", "the same command again uploads what is missing"):
        say(*hub_upload.lines(hub_push.push(run, adapter, config.repository, public=config.public)))
    return 0


if __name__ == "__main__":
    run_main(main, CONFIG)
