"""The command line of the scripts that have no config: argparse's, with one sentence for a mistake, as everywhere else."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any, NoReturn

from sushi_research import terminal

# How argparse's own messages begin. Ours say what to do.
_OF_ARGPARSE = ("argument ", "unrecognized arguments", "the following arguments are required", "one of the arguments")


class Parser(argparse.ArgumentParser):
    """argparse's parser without abbreviations. A mistake is `error: SENTENCE` and ends in status 2; --help has the usage.

    The commands of `add_subparsers` have this class too.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
        # argparse takes -1e-3 and -inf for options (until Python 3.14 the first, later the second).
        self._negative_number_matcher = re.compile(r"-((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|inf|nan)$", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        """Ends the process with a sentence."""
        advice = f" ({self.prog} --help describes all)" if message.startswith(_OF_ARGPARSE) else ""
        terminal.say(f"error: {message}{advice}", file=sys.stderr)
        raise SystemExit(2)
