"""Imports without the garbage collector."""

from __future__ import annotations

import gc

import pytest

from sushi_research.imports import importing


def test_the_collector_rests_while_libraries_are_imported() -> None:
    assert gc.isenabled()
    before = gc.get_freeze_count()
    with pytest.raises(RuntimeError), importing("sys"):
        assert not gc.isenabled()
        raise RuntimeError
    assert gc.isenabled()
    assert gc.get_freeze_count() == before, "only what the first import of a library leaves is frozen"
    gc.disable()  # as in `process.begin`
    try:
        with importing("sys"):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_the_first_import_leaves_is_not_searched_again() -> None:
    try:
        with importing("a_library_that_was_never_imported"):
            pass
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()
