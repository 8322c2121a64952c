"""Whether the Hugging Face hub can be reached from here. Asked in the background and with a limit, for scripts/doctor.py."""

from __future__ import annotations

import os
import queue
import threading
import urllib.error
import urllib.request
from pathlib import Path

from sushi_research.errors import first_line


class HubAccess:
    """One question to the hub, which begins at once; `problem` waits for the answer."""

    def __init__(self, seconds: float = 1.5) -> None:
        """`seconds` is the limit for the answer."""
        self._seconds = seconds
        self._answer: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        if not is_offline():
            # The name of the hub may take longer to resolve than any limit, so nobody waits for this thread.
            threading.Thread(target=self._ask, daemon=True).start()

    def problem(self) -> str | None:
        """Why the hub cannot be used; None if it answers."""
        if is_offline():
            return "HF_HUB_OFFLINE is set, so nothing is fetched (unset it to fetch models)"
        try:
            reason = self._answer.get(timeout=self._seconds)
        except queue.Empty:
            reason = f"no answer within {self._seconds:g} s"
        return reason and f"it cannot be reached ({reason}): models that are in the hub cache can be used"

    def _ask(self) -> None:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        try:
            request = urllib.request.Request(endpoint, method="HEAD", headers={"User-Agent": "sushi-research"})
            urllib.request.urlopen(request, timeout=self._seconds).close()
            self._answer.put(None)
        except (
            urllib.error.HTTPError
        ) as error:  # it answers, unless this is the answer of a proxy or of a server that is down
            is_there = error.code < 500 and error.code != 407
            self._answer.put(None if is_there else f"{endpoint} answers {error.code}")
        except (OSError, ValueError) as error:
            self._answer.put(f"{endpoint}: {first_line(getattr(error, 'reason', None) or error)}")


def is_offline() -> bool:
    """Whether the hub's library is told to fetch nothing."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def hub_cache() -> Path:
    """The folder of the hub's cache, by the hub's own rule."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def is_in_cache(repository: str) -> bool:
    """Whether the hub's cache has something of a repository, given as owner/name."""
    owner, name = repository.split("/")
    return (hub_cache() / f"models--{owner}--{name}").is_dir()
