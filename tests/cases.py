"""Many instances of one rule in one test: what fails says which instance it was."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def case(what: object) -> Iterator[None]:
    """An error inside is reported with `what`."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"case: {what}")
        raise
