"""Commands of the user's become words, with their placeholders replaced."""

import sys

from sushi_research.config.user_commands import words_of


def test_placeholders_are_replaced_once():
    values = {"{run}": "runs/{step}", "{step}": "7"}
    assert words_of("python x{run} '{step} b'", values) == [sys.executable, "xruns/{step}", "7 b"]
