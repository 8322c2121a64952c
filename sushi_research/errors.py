"""The one exception that means "the user can mend this", and the hints that its sentences often need."""

import difflib
import re
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can mend: its message is one sentence that says what is wrong, where, and what to do.

    Scripts print the message without a traceback and exit with status 2. What a file or a path brings into the sentence
    cannot break it: control characters are escaped, and a word of more than 300 letters is cut in its middle.
    """

    def __init__(self, message: str) -> None:
        printable = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in message)
        super().__init__(re.sub(r"\S{300,}", lambda word: f"{word[0][:200]}...{word[0][-60:]}", printable))


class UserErrors(UserError):
    """Several mistakes at once, a line each."""

    def __init__(self, messages: Iterable[str]) -> None:
        ValueError.__init__(self, "\n".join(messages))


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean x?)` for the known name that is closest to a mistyped one; nothing where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none: what fits into a sentence of our own."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
