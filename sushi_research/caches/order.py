"""The order of a store's shards, which decides between two values of one key.

Two machines that fill one folder at once may both make an entry, and their devices may round differently. The value in the shard
that was seen first counts, for every reader and for good: before a reader uses shards that are not listed yet, it adds their names
to the list. The list is only added to, in files `order-00000000.txt`, `order-00000001.txt`, ... with one name per line. A file
appears whole, under a number that was free (a hard link never replaces a file), so readers agree on the order also if they come at
the same time. How a shard came into the folder does not matter.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable
from pathlib import Path

from sushi_research.files import fsync_file, fsync_folder
from sushi_research.temporaries import temporary_file
from sushi_research.user_files import read_regular

# How long another writer may take for the few bytes of a file that it could not create whole.
_PATIENCE_SECONDS = 1.0


def in_order(folder: Path, names: Iterable[str]) -> list[str]:
    """The names of all shards that were ever listed, in order; those of `names` that nobody has listed yet are listed first.

    If the list cannot be written, for example in a read-only folder, the order of new names is that of this call, by name.
    Raises UserError if the list cannot be read.
    """
    while True:
        known, number = _read(folder)
        new = sorted(set(names) - known.keys())
        if not new:
            return list(known)
        try:
            _create(folder / f"order-{number:08d}.txt", "".join(f"{name}\n" for name in new).encode())
        except FileExistsError:
            continue  # another reader was faster
        except OSError:
            pass
        return [*known, *new]


def _read(folder: Path) -> tuple[dict[str, None], int]:
    """The listed names in order (as the keys of a dict), and the first free number."""
    names: dict[str, None] = {}
    for number in itertools.count():
        path, until = folder / f"order-{number:08d}.txt", time.monotonic() + _PATIENCE_SECONDS
        if not path.exists():
            break
        # A name has 40 bytes.
        text = read_regular(path, 2**30)
        while not text.endswith(b"\n") and time.monotonic() < until:
            time.sleep(0.02)
            text = read_regular(path, 2**30)
        # What is damaged lists nothing that is there.
        names |= dict.fromkeys(text.decode(errors="replace").splitlines())
    return names, number


def _create(path: Path, data: bytes) -> None:
    """Creates a file whole, or raises FileExistsError if there is one."""
    with temporary_file(path.parent / "order.txt") as (file, temporary):
        file.write(data)
        fsync_file(file)
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            with path.open("xb") as whole:
                whole.write(data)
                fsync_file(whole)
        os.unlink(temporary)
    fsync_folder(path.parent)
