"""Parts of the commands that messages suggest: whatever a path contains, the command can be pasted into a shell."""

from __future__ import annotations

import os
import shlex


def word(text: str) -> str:
    """`text` as one word of a shell's command line; control characters in bash's and zsh's `$'...'` form."""
    if text.isprintable():
        return shlex.quote(text)
    plain = (
        chr(byte) if 32 <= byte < 127 and chr(byte) not in "\\'" else f"\\x{byte:02x}" for byte in os.fsencode(text)
    )
    return f"$'{''.join(plain)}'"


def setting(key: str, value: str) -> str:
    """The option that gives a config key this text; a value that begins with two hyphens must be in one word with its key."""
    return word(f"--{key}={value}") if value.startswith("--") else f"--{key} {word(value)}"
