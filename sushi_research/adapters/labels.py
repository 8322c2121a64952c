"""Labels of adapter files: different files get different labels, also as folder names on any file system."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from sushi_research.fingerprints import content_hash


def label_of(file: Path) -> str:
    """Label of an adapter file in tables: its name without the suffix."""
    return file.stem


def labels_of(
    paths: Sequence[Path],
    reserved: Collection[str] = (),
    is_free: Callable[[str, str], bool] = lambda label, file: True,
) -> list[str]:
    """A label for each adapter file: `label_of`, and the start of the hash of its bytes where that is not unique.

    Labels count as equal if a file system may take them for one name: macOS and Windows ignore case, macOS the form in which
    accents are written. `reserved` are names that no label may have; `is_free(label, hash of the file)` says whether a label that
    is unique here may be used. Raises OSError if a file cannot be read.
    """
    plain = [label_of(path) for path in paths]
    counts = Counter(file_name_key(label) for label in [*plain, *reserved])
    taken = {file_name_key(name) for name in reserved}
    labels = []
    for path, label in zip(paths, plain, strict=True):
        digest = content_hash(path.read_bytes())
        marked = f"{label}-{digest[:8]}"
        # The same bytes under several names are numbered.
        candidates = [label] if counts[file_name_key(label)] == 1 else []
        candidates += [marked, *(f"{marked}-{number}" for number in range(2, len(paths) + 2))]
        chosen = next(name for name in candidates if file_name_key(name) not in taken and is_free(name, digest))
        taken.add(file_name_key(chosen))
        labels.append(chosen)
    return labels


def file_name_key(name: str) -> str:
    """Equal for names that a file system may not tell apart. Windows drops dots and spaces at the end."""
    return unicodedata.normalize("NFC", name).casefold().rstrip(". ")
