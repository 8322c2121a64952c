"""The rows of a result file (results.py) as arrays, matched by their key (step, image, noise sample) in any order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sushi_research.errors import UserError

if TYPE_CHECKING:
    import pyarrow

NUM_TIMESTEPS = 1000  # that of objectives/schedule.py, which imports torch
COLUMNS = ("step", "image", "noise_sample", "timestep", "loss", "base_loss")
_REPEATED = re.compile(r"([0-9a-f]{32})#\d+")


@dataclass(frozen=True)
class ResultArrays:
    """Results at T steps on N names (image hashes or captions) with K noise samples: `loss` [T, N, K]; `base`, `timesteps` [N, K].

    `steps` increase; `names` are in the order of the file. `rows` are the numbers of the rows in use, of equal rows the first;
    `repeated` is the number of the other rows.
    """

    names: tuple[str, ...]
    steps: tuple[int, ...]
    timesteps: np.ndarray
    loss: np.ndarray
    base: np.ndarray
    rows: np.ndarray
    repeated: int


def row_names(names: Sequence[str]) -> list[str]:
    """A distinct name for each element of a set: an image that occurs again, with another caption, gets `#2`, `#3`, ..."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return found


def image_of(name: str) -> str:
    """The image's hash in a name that `row_names` made; any other name unchanged."""
    repeated = _REPEATED.fullmatch(name)
    return repeated[1] if repeated else name


def by_image(arrays: ResultArrays) -> ResultArrays:
    """The arrays with one name per image: the losses of an image with several captions are averaged over them, in float64."""
    places = _places_by_image(arrays.names)
    if len(places) == len(arrays.names):
        return arrays
    loss, base = (over_captions(arrays.names, values) for values in (arrays.loss, arrays.base))
    times = np.stack([arrays.timesteps[several[0]] for several in places.values()])
    return replace(arrays, names=tuple(places), timesteps=times, loss=loss, base=base)


def over_captions(names: Sequence[str], values: np.ndarray) -> np.ndarray:
    """[.., N, K] of N names -> [.., images, K]: the mean over the captions of each image, in float64."""
    places = _places_by_image(names)
    if len(places) == len(names):
        return values
    return np.stack([values[..., several, :].mean(-2, dtype=np.float64) for several in places.values()], axis=-2)


def _places_by_image(names: Sequence[str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(image_of(name), []).append(place)
    return places


def arrays_of(path: Path, table: pyarrow.Table) -> ResultArrays | None:
    """The rows of `path` as arrays; None if there are none. Equal rows count once.

    UserError, which names the file: a row without a value, two rows of one key with different values, a step that lacks an image
    or a noise sample, a timestep or base loss that differs between steps, a number of images or noise samples that is not the one
    recorded in the file.
    """
    if table.num_rows == 0:
        return None
    if any(table[name].null_count for name in COLUMNS):
        raise refused(path, "has a row without a value")
    columns = {name: table[name].to_numpy() for name in COLUMNS}
    names = tuple(dict.fromkeys(columns["image"].tolist()))
    steps = tuple(sorted(set(columns["step"].tolist())))
    samples = columns["noise_sample"].astype(np.int64)
    shape = (len(steps), len(names), int(samples.max()) + 1)
    recorded = {key: table.schema.metadata.get(key) for key in (b"names", b"noise_samples")}
    wrong = [known not in (None, str(size).encode()) for known, size in zip(recorded.values(), shape[1:], strict=True)]
    if columns["timestep"].min() < 0 or columns["timestep"].max() >= NUM_TIMESTEPS:
        raise refused(path, f"has timesteps outside 0 to {NUM_TIMESTEPS - 1}")
    if any(wrong) or samples.min() < 0 or steps[0] < 0 or table.num_rows < np.prod(shape):
        raise refused(path, "does not have the same images and noise samples at every step, or lost some")
    place_of_name = {name: place for place, name in enumerate(names)}
    places = np.array([place_of_name[name] for name in columns["image"].tolist()])
    keys = np.ravel_multi_index((np.searchsorted(steps, columns["step"]), places, samples), shape)
    found, rows = np.unique(keys, return_index=True)
    if len(found) < np.prod(shape):
        raise refused(path, "does not have the same images and noise samples at every step")
    first = rows[np.searchsorted(found, keys)]
    arrays = {}
    for name in ("timestep", "loss", "base_loss"):
        values = columns[name]
        differ = ~_same(values, values[first])
        if differ.any():
            row = int(differ.argmax())
            raise refused(
                path,
                f"holds two different values of {name} for {columns['image'][row]} at step {columns['step'][row]}, noise sample "
                f"{samples[row]}",
            )
        arrays[name] = values[rows].reshape(shape)
    for name in ("timestep", "base_loss"):
        if not _same(arrays[name], arrays[name][:1]).all():
            raise refused(path, f"holds values of {name} that differ between steps")
    repeated = table.num_rows - len(rows)
    return ResultArrays(
        names, steps, arrays["timestep"][0], arrays["loss"], arrays["base_loss"][0], np.sort(rows), repeated
    )


def refused(path: Path, what: str) -> UserError:
    """The error for a file that cannot be used."""
    return UserError(f"{path} {what}: restore it, or remove it to evaluate again.")


def _same(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Where values are equal; NaN equals NaN."""
    return (one == other) | ((one != one) & (other != other))
