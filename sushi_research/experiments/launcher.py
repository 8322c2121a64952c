"""`accelerate launch` that ends as the script did which it launched. `python -m sushi_research.experiments.launcher ARGUMENTS`.

accelerate itself ends in status 1, whatever happened, after a traceback of its own: so a mistake of the user's (2) could not be
told from a crash, nor a process that was killed for its memory from either, and the last line would not be the script's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence


def main(arguments: Sequence[str], launch: Callable[[], object] | None = None) -> int:
    """Launches; returns the exit status of the script, that of its first process to fail.

    Where a signal ended it, this process ends by the same signal.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if launch is None:
        from accelerate.commands.accelerate_cli import main as launch

    sys.argv = ["accelerate", "launch", *arguments]
    try:
        launch()
    except subprocess.CalledProcessError as error:  # of one process
        status = error.returncode
    except ChildFailedError as error:  # of several, by torchrun
        status = error.get_first_failure()[1].exitcode
    else:
        return 0
    if status < 0:
        sys.stdout.flush()
        with contextlib.suppress(OSError):  # SIGKILL has no handler, torchrun's SIGTERM has
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status if status > 0 else 128 - status  # where the signal is ignored


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
