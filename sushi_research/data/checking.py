"""Decodes the images of a data path once, in parallel, and remembers what it learns of each: size, hash, colours, or a problem."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec

import numpy as np
import PIL
import pyarrow
import pyarrow.compute

from sushi_research import stopping
from sushi_research.data.images import BadImage
from sushi_research.data.inspecting import ImageFacts, Unusable, inspect
from sushi_research.data.samples import FINGERPRINT_BYTES, HASH
from sushi_research.errors import UserError
from sushi_research.fingerprints import content_hash
from sushi_research.progress import progress
from sushi_research.remembered import Array, Remembered
from sushi_research.user_files import UnreadableFile
from sushi_research.workers import Worker, WorkerEnded, cores, results

# Increment it when the facts about an image change, or what `images.decode` accepts.
_VERSION = 1
# So many images are worth the start of worker processes, which takes about half a second. Fewer are decoded in threads.
PROCESSES_FROM = 200
# While images are checked, the facts are stored so often, in seconds, and more rarely if that takes a large share of the time.
_STORE_SECONDS, _STORE_SHARE = 60.0, 20.0
_TEXTS = ("converted_from", "ignored", "problem")


def decoders() -> str:
    """What decides whether an image file can be decoded, besides its bytes."""
    return f"Pillow {PIL.__version__}" + (", HEIC" if find_spec("pillow_heif") else "")


@dataclass(frozen=True)
class Place:
    """Where images are read: `read(row)` gives the bytes of one, `path(row)` the path of its file, or None where it has none.

    `name` is a hash of what tells the place from others. Facts about one of its images are found again by its text in `keys`, or by
    its row number if that is None; and only if its row of `states` [N, 4] is what it was. `settled` [N]: whether the state of an
    image tells that it is unchanged. `there` [N]: whether there is an image, and not a problem that is recorded already. `version`
    differs if the states of a table's images do.
    """

    name: str
    read: Callable[[int], bytes]
    path: Callable[[int], str | None]
    states: np.ndarray
    settled: np.ndarray
    there: np.ndarray
    keys: pyarrow.Array | None = None
    version: str = ""


@dataclass(eq=False)
class Facts:
    """What is known of N images, in columns as in `ImageFacts`; `texts` has those texts that are not empty, by kind and row.

    `known` [N]: whether an image was looked at. `passing` are the rows whose problem may not last.
    """

    known: np.ndarray
    images: np.ndarray
    widths: np.ndarray
    heights: np.ndarray
    fingerprints: np.ndarray
    transparent: np.ndarray
    texts: dict[str, dict[int, str]] = field(default_factory=lambda: {kind: {} for kind in _TEXTS})
    passing: set[int] = field(default_factory=set)

    @classmethod
    def none(cls, size: int) -> Facts:
        """Nothing about `size` images."""
        return cls(
            np.zeros(size, bool),
            np.zeros(size, HASH),
            np.zeros(size, np.int32),
            np.zeros(size, np.int32),
            np.zeros((size, FINGERPRINT_BYTES), np.uint8),
            np.zeros(size, bool),
        )

    @property
    def usable(self) -> np.ndarray:
        """[N] bool: the images that were decoded."""
        usable = self.known.copy()
        usable[list(self.texts["problem"])] = False
        return usable

    def learn(self, row: int, found: ImageFacts | Unusable) -> None:
        """Notes what was found of an image."""
        self.known[row] = True
        if isinstance(found, Unusable):
            self.texts["problem"][row] = found.reason
            if not found.lasting:
                self.passing.add(row)
            return
        self.images[row], self.widths[row], self.heights[row] = found.hash.encode(), found.width, found.height
        self.fingerprints[row] = np.frombuffer(found.fingerprint, np.uint8)
        self.transparent[row] = found.transparent
        for kind in ("converted_from", "ignored"):
            if text := getattr(found, kind):
                self.texts[kind][row] = text

    def columns(self, rows: np.ndarray) -> dict[str, Array]:
        """The facts about these rows as columns."""
        places = np.full(len(self.known), -1)
        places[rows] = np.arange(len(rows))
        columns: dict[str, Array] = {
            name: getattr(self, name)[rows] for name in ("images", "widths", "heights", "fingerprints", "transparent")
        }
        for kind, texts in self.texts.items():
            kept = sorted(row for row in texts if places[row] >= 0)
            columns[f"{kind}_rows"] = places[kept] if kept else np.zeros(0, np.int64)
            columns[kind] = pyarrow.array([texts[row] for row in kept], pyarrow.large_string())
        return columns

    def recall(self, columns: Mapping[str, Array], places: np.ndarray) -> None:
        """Takes up what `columns` gave: the fact number i is about the row `places[i]`; about none any more if that is -1."""
        left = places >= 0
        rows = places[left]
        self.known[rows] = True
        for name in ("images", "widths", "heights", "fingerprints", "transparent"):
            getattr(self, name)[rows] = columns[name][left]
        for kind, texts in self.texts.items():
            for place, text in zip(columns[f"{kind}_rows"].tolist(), columns[kind].to_pylist(), strict=True):
                if places[place] >= 0:
                    texts[int(places[place])] = text


def check(place: Place, names: pyarrow.Array, remembered: Remembered, show_progress: bool) -> Facts:
    """The facts about the images of a place. Those that are not remembered are decoded, on all cores.

    What is learned is stored, also if the check is interrupted. Raises UserError if a process that decodes is killed.
    """
    facts, key = Facts.none(len(names)), content_hash(f"{_VERSION} {place.name}".encode())
    _recall(facts, place, remembered.find("image-facts", key))
    unknown = np.flatnonzero(place.there & ~facts.known)
    if not len(unknown):
        return facts
    with stopping.doing("checking images", "what is checked is kept; the same command again continues"):
        try:
            _learn(facts, place, names, unknown, show_progress, lambda: _store(facts, place, remembered, key))
        finally:  # so that an interrupted check can continue where it stopped
            _store(facts, place, remembered, key)
    return facts


def _learn(
    facts: Facts, place: Place, names: pyarrow.Array, rows: np.ndarray, show_progress: bool, store: Callable[[], None]
) -> None:
    """Decodes the images `rows`, and calls `store` now and then."""
    stored_at, took = time.monotonic(), 0.0
    bar = progress(
        _inspect(place, names, rows),
        total=len(rows),
        description="checking images",
        unit="image",
        disable=not show_progress,
    )
    for row, found in bar:
        facts.learn(row, found)
        if time.monotonic() - stored_at > max(_STORE_SECONDS, _STORE_SHARE * took):
            stored_at = time.monotonic()
            store()
            took = time.monotonic() - stored_at


def _inspect(place: Place, names: pyarrow.Array, rows: np.ndarray) -> Iterator[tuple[int, ImageFacts | Unusable]]:
    def call(row: int, worker: Worker | None) -> ImageFacts | Unusable:
        try:
            image = place.path(row) or place.read(row)
            return worker(image) if worker else inspect(image)
        except WorkerEnded as error:
            raise UserError(
                f"{names[row]} could not be checked, because the process that decoded it ended ({error.reason}), as happens when "
                "there is no memory left: close other programs, or remove that image, and run the same command again; what was "
                "checked before is kept."
            ) from None
        except (BadImage, UnreadableFile) as error:
            # That a row has no image lasts; where the file that it names is does not.
            return Unusable(error.reason, lasting=isinstance(error, BadImage) and not place.states[row].any())
        except OSError as error:
            return Unusable(f"cannot be read: {error.strerror or error}", lasting=False)

    function = inspect if len(rows) >= PROCESSES_FROM else None
    return results(map(int, rows), call, count=min(cores(), len(rows)), function=function)


def _recall(facts: Facts, place: Place, stored: Mapping[str, Array] | None) -> None:
    size = len(facts.known)
    if stored is None or not size:
        return
    # Where each fact is now: at the row of the same key, if that has the same state.
    if place.keys is None:
        places = np.where(stored["rows"] < size, stored["rows"], -1)
    else:
        places = pyarrow.compute.index_in(stored["keys"], value_set=place.keys).fill_null(-1).to_numpy()
    places = np.where((place.states[places] == stored["states"]).all(axis=1), places, -1)
    if stored["decoders"][0].as_py() != decoders():  # which may read what could not be read before
        places[stored["problem_rows"]] = -1
    facts.recall(stored, places)


def _store(facts: Facts, place: Place, remembered: Remembered, key: str) -> None:
    keep = facts.known & place.settled
    keep[list(facts.passing)] = False
    rows = np.flatnonzero(keep)
    columns = facts.columns(rows) | {"states": place.states[rows], "decoders": pyarrow.array([decoders()])}
    if place.keys is None:
        columns["rows"] = rows
    else:
        columns["keys"] = place.keys.take(pyarrow.array(rows))
    remembered.put("image-facts", key, columns)
