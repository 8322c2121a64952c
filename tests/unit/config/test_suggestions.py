"""A command that a message suggests can be pasted as it is shown."""

import os
import subprocess

import pytest

from sushi_research.config.suggestions import word
from sushi_research.errors import printable

pytestmark = pytest.mark.skipif(os.name == "nt", reason="bash")


@pytest.mark.parametrize("text", ["a\nb", "it's\t\\ \x1b[31m", "寿司\u3000桜", "plain/name"])
def test_a_word_is_read_back(text):
    shown = printable(word(text))
    done = subprocess.run(["bash", "-c", f"printf %s {shown}"], capture_output=True, check=True)
    assert done.stdout == text.encode()
