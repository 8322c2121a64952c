"""A run of another version is answered with a sentence."""

import pytest

from sushi_research.errors import UserError
from sushi_research.runs.identity import require_same_run


def test_facts_of_another_version_are_named():
    old = {"lora.rank": 16, "facts.samples_per_step": 4}
    new = {"lora.rank": 16, "facts.global_batch_size": 4}
    with pytest.raises(UserError, match=r"samples_per_step \(a fact of another version\)"):
        require_same_run("trial", old, new)
