"""Reads the settings of a run that an older version made in the keys of this version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sushi_research import models
from sushi_research.config.keys import default_values
from sushi_research.config.renamed_keys import with_new_names
from sushi_research.runs import identity


def settings_in_this_version(
    stored_identity: dict[str, Any], settings: dict[str, Any], architecture: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(identity, settings) of a run, both flat, with the default of every setting that its version did not have.

    `architecture` is its name in plan.json. If it is not known, only the defaults that all architectures share are filled in.
    """
    defaults = _defaults(architecture)
    return identity.in_this_version(stored_identity, defaults), identity.flat_defaults(defaults) | with_new_names(
        settings
    )


def _defaults(architecture: Any) -> Mapping[str, Any]:
    classes = models.config_classes()
    if architecture in classes:
        return default_values(classes[architecture])
    first, *others = map(default_values, classes.values())
    return {key: value for key, value in first.items() if all(key in each and each[key] == value for each in others)}
