"""The variants of an experiment: as named, as every combination of a grid, or as random draws from a search space.

A search space is written as W&B's sweeps write their `parameters`, so that one file serves both. A draw is a function of the
search's seed, the key and the number of the draw: more samples keep the earlier ones, and a key that is added keeps the others'
values.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from sushi_research import randomness
from sushi_research.errors import UserError
from sushi_research.fingerprints import content_hash

EXAMPLE = "{distribution: log_uniform_values, min: 1.0e-5, max: 1.0e-3} or {values: [4, 8]}"
# The keys of a parameter in W&B's form, by which it is told from a section.
PARAMETER = ("value", "values", "probabilities", "distribution", "min", "max", "mu", "sigma", "q")
# By the name of a distribution: the numbers that it needs. Those of a logarithm have the bounds of the logarithm.
DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "constant": ("value",),
    "categorical": ("values",),
    "int_uniform": ("min", "max"),
    "uniform": ("min", "max"),
    "q_uniform": ("min", "max"),
    "log_uniform": ("min", "max"),
    "q_log_uniform": ("min", "max"),
    "log_uniform_values": ("min", "max"),
    "q_log_uniform_values": ("min", "max"),
    "normal": (),
    "q_normal": (),
    "log_normal": (),
    "q_log_normal": (),
}
# Of the numbers of a distribution; q is at least one through it.
MOST = 1e15
# A draw is rounded to so many significant digits: no result depends on the others, and names can be read.
DIGITS = 4
# Draws that repeat an earlier one are passed over, up to so many for each sample.
MOST_DRAWS = 100
# Of the name of a variant that is made from its values: a run's name adds the seed, and has at most 200.
MOST_LETTERS = 160
# Of a range of whole numbers in a grid.
MOST_VALUES = 1000

Variants = Iterator[tuple[str, dict[str, Any]]]


def leaves(space: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, parameter) of each parameter of a search space; anything else in the place of one as it is."""
    for name, value in space.items():
        if isinstance(value, dict) and not is_parameter(value):
            inner = value.get("parameters") if len(value) == 1 else None  # as W&B nests them
            yield from leaves(inner if isinstance(inner, dict) else value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def is_parameter(value: Mapping[str, Any]) -> bool:
    """Whether a mapping is a parameter in W&B's form, and not a section or one of its keys that has such a name."""
    known = [key for key in value if key in PARAMETER]
    return bool(known) and not any(isinstance(value[key], dict) for key in known)


def distribution_of(key: str, parameter: Any) -> str:
    """The distribution of a parameter, as W&B reads it if it names none. UserError for one that cannot be drawn from."""
    if not isinstance(parameter, dict) or not is_parameter(parameter):
        raise UserError(f"search: {key} is {parameter!r}, which is no parameter: give {EXAMPLE}.")
    if unknown := [name for name in parameter if name not in PARAMETER]:
        raise UserError(f"search: {key} has the unknown key {unknown[0]}: a parameter has {', '.join(PARAMETER)}.")
    name = parameter.get("distribution")
    if name is None:
        bounds = [parameter.get("min"), parameter.get("max")]
        whole = all(type(bound) is int for bound in bounds)
        name = "constant" if "value" in parameter else "categorical" if "values" in parameter else "uniform"
        name = "int_uniform" if name == "uniform" and whole else name
    if not isinstance(name, str) or name not in DISTRIBUTIONS:
        known = ", ".join(DISTRIBUTIONS)
        raise UserError(f"search: {key} has the distribution {name!r}, which is not known here: use one of {known}.")
    if without := [each for each in DISTRIBUTIONS[name] if each not in parameter]:
        raise UserError(f"search: {key} ({name}) needs {without[0]}: give it, as in {EXAMPLE}.")
    _require_numbers(key, name, parameter)
    return name


def _require_numbers(key: str, name: str, parameter: Mapping[str, Any]) -> None:
    """UserError unless the numbers of a parameter are such that it can be drawn from."""
    wrong = ""
    for each in ("min", "max", "mu", "sigma", "q"):
        value = parameter.get(each, 1)
        if type(value) not in (int, float) or not -MOST <= value <= MOST:
            wrong = f"{each} must be a number, at most {MOST:g}"
    values, chances = parameter.get("values"), parameter.get("probabilities")
    low, high = parameter.get("min"), parameter.get("max")
    if wrong:
        pass
    elif name == "categorical" and (not isinstance(values, list) or not values):
        wrong = "values must be a list that is not empty"
    elif chances is not None and not _are_chances(chances, values):
        wrong = "probabilities must be a list with one for each of values, of the sum 1"
    elif "min" in DISTRIBUTIONS[name] and not low <= high:
        wrong = "min must not be above max"
    elif "log" in name and name.endswith("values") and low <= 0:
        wrong = "min must be above 0"
    elif "log_uniform" in name and not name.endswith("values") and high > 50:
        wrong = "min and max are logarithms; the distribution log_uniform_values has the values themselves"
    elif parameter.get("q", 1) < 1 / MOST or parameter.get("sigma", 1) < 0:
        wrong = "q must be above 0 and sigma not below"
    elif name == "int_uniform" and not all(type(bound) is int for bound in (low, high)):
        wrong = "min and max must be whole numbers"
    if wrong:
        raise UserError(f"search: {key} ({name}): {wrong}.")


def _are_chances(chances: Any, values: Any) -> bool:
    fit = isinstance(chances, list) and isinstance(values, list) and len(chances) == len(values)
    fit = fit and all(type(each) in (int, float) and 0 <= each <= 1 for each in chances)
    return fit and math.isclose(sum(chances), 1.0, rel_tol=1e-6)


def drawn(key: str, parameter: Mapping[str, Any], seed: int, number: int) -> Any:
    """The value of a parameter in the draw `number`, by the distribution of W&B's that it names or means.

    https://docs.wandb.ai/models/sweeps/sweep-config-keys: `uniform` on min to max, `log_uniform` its exponential,
    `log_uniform_values` with the values as bounds, `int_uniform` with both bounds included, `normal` with mu and sigma (0 and 1),
    `log_normal` its exponential, and `q_...` rounded to a multiple of q (1), which is whole if q is.
    """
    name, random = distribution_of(key, parameter), randomness.key(seed, "search", key, number)
    if name == "constant":
        return parameter["value"]
    if name == "categorical":
        chances = parameter.get("probabilities")
        chances = chances and [chance / sum(chances) for chance in chances]
        return parameter["values"][int(random.choice(len(parameter["values"]), p=chances))]
    if name == "int_uniform":
        return int(random.integers(parameter["min"], parameter["max"], endpoint=True))
    if name.endswith("normal"):
        value = random.normal(parameter.get("mu", 0.0), parameter.get("sigma", 1.0))
    elif name.endswith("values"):
        value = random.uniform(math.log(parameter["min"]), math.log(parameter["max"]))
    else:
        value = random.uniform(parameter["min"], parameter["max"])
    value = math.exp(min(value, 100.0)) if "log" in name else value
    if name.startswith("q_"):
        q = parameter.get("q", 1)
        multiple = round(value / q)
        return multiple * q if type(q) is int else float(f"{multiple * q:.12g}")
    return float(f"{value:.{DIGITS}g}")


def grid_of(axes: Mapping[str, Any]) -> Variants:
    """Every combination of the axes, named after its values."""
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"grid: {key} is {values!r}: give a list of the values to try.")
    for values in itertools.product(*axes.values()):
        settings = dict(zip(axes, values, strict=True))
        yield name_of(settings), settings


def draws_of(space: Mapping[str, Any], samples: int, seed: int) -> Variants:
    """The first distinct draws, named after their values. UserError if the space has fewer than `samples` of them."""
    parameters, seen = dict(leaves(space)), set()
    varied = [key for key, parameter in parameters.items() if distribution_of(key, parameter) != "constant"]
    for number in range(samples * MOST_DRAWS):
        settings = {key: drawn(key, parameter, seed, number) for key, parameter in parameters.items()}
        if (text := json.dumps(settings)) in seen:
            continue
        seen.add(text)
        yield name_of({key: settings[key] for key in varied} or settings), settings
        if len(seen) == samples:
            return
    raise UserError(
        f"search has {len(seen)} different values or combinations in {samples * MOST_DRAWS} draws, and samples is {samples}: give "
        "fewer samples, or a grid for every combination."
    )


def name_of(settings: Mapping[str, Any]) -> str:
    """The name of a variant after its values: rank-8_snr_gamma-null. One that would be too long ends in a hash of all of them."""
    name = "_".join(f"{key.rpartition('.')[2]}-{_in_a_name(value)}" for key, value in settings.items())
    if len(name) <= MOST_LETTERS:
        return name
    return f"{name[:MOST_LETTERS]}_{content_hash(json.dumps(settings).encode())[:8]}"


def _in_a_name(value: Any) -> str:
    """A value as part of a folder name."""
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(each if each.isascii() and each.isalnum() or each in ".-" else "-" for each in text).strip("-")
