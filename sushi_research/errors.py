"""UserError, the exception for mistakes that the user can correct, and helpers for its messages."""

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """A mistake that the user can correct. The message is one sentence: what is wrong, where, and what to do.

    Scripts print the message without a traceback and exit with status 2. Text from files and paths is made safe: control
    characters are escaped, and words of 300 letters or more are shortened.
    """

    def __init__(self, message: str) -> None:
        super().__init__(re.sub(r"\S{300,}", lambda word: f"{word[0][:200]}...{word[0][-60:]}", printable(message)))


class NotFinite(UserError):
    """A loss or gradients of the training that are not finite."""


class UserErrors(UserError):
    """Several mistakes, one per line."""

    def __init__(self, messages: Iterable[str]) -> None:
        ValueError.__init__(self, "\n".join(printable(message) for message in messages))


def printable(text: str) -> str:
    """`text` on one line that every terminal can show.

    Escaped are control characters, line separators, halves of surrogate pairs, and invisible characters, such as those that change
    the direction of the text. Spaces of every width stay, and so do the joiners of Persian and Indian scripts and of emoji.
    """
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(char: str) -> str:
    harmless = char.isprintable() or unicodedata.category(char) == "Zs" or char in "\u200c\u200d"
    return char if harmless else char.encode("unicode_escape").decode()


def printable_lines(text: str) -> str:
    """`printable` for each line of a text: its line breaks stay."""
    return "\n".join(printable(line) for line in text.split("\n"))


def some(names: Sequence[str], most: int = 4) -> str:
    """The first `most` names, and the number of the others: "a, b and 3 more"."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean x?)` with the known name closest to a mistyped one; "" if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if the message is empty; for use in our own messages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
