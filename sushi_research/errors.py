"""The one exception that means "the user can mend this", and the hint that its sentences often need."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can mend: its message is one sentence that says what is wrong, where, and what to do.

    Scripts print the message without a traceback and exit with status 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean x?)` for the known name that is closest to a mistyped one; nothing where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
