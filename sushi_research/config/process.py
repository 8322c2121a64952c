"""How a script begins and ends: its standard streams, its command line, its signals, its errors and its exit status."""

from __future__ import annotations

import gc
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from pydantic import BaseModel

from sushi_research import stopping, terminal
from sushi_research.config.command_line import load_config
from sushi_research.errors import UserError

Config = TypeVar("Config", bound=BaseModel)


def begin() -> None:
    """Prepares the process of a script: call it before any heavy import. `read_command_line` calls it.

    Until `run_main` no garbage is collected, as in `imports.importing`. Under `python -W error` or PYTHONWARNINGS=error, warnings
    are shown and are no errors: they are all of libraries.
    """
    if "torch" not in sys.modules:
        gc.disable()
    terminal.prepare()
    if any(action == "error" for action, *_ in warnings.filters):
        warnings.filterwarnings("default")
    if not sys.stderr.isatty():
        # Those of `datasets` rewrite their line with control codes. Ours are lines there (`progress.Lines`).
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    stopping.end_at_once()


def read_command_line(
    config_class: type[Config], *, script: str, intro: str, argv: Sequence[str] | None = None
) -> Config:
    """`load_config` for the command line of this process. A UserError is printed, and the exit status is 2.

    Scripts call this before any heavy import, so that --help and a mistyped key are answered at once.
    """
    begin()
    try:
        return load_config(config_class, sys.argv[1:] if argv is None else argv, script=script, intro=intro)
    except UserError as error:
        if stopping.is_first():  # all processes of a launch find the same error here
            _say(f"error: {error}")
        raise SystemExit(2) from None


def read_architecture(
    classes: Mapping[str, type[Config]], arguments: Sequence[str], *, script: str, intro: str, example: str
) -> Config:
    """`read_command_line` with the architecture (a key of `classes`) as the first word. --help alone describes `example`."""
    begin()
    architecture, rest = (arguments[0], arguments[1:]) if arguments else (example, [])
    if architecture in ("-h", "--help"):
        architecture, rest = example, ["--help"]
    if architecture not in classes:
        _say(
            f"error: {architecture} is not an architecture: begin with {' or '.join(classes)}, then the options of that training "
            "script."
        )
        raise SystemExit(2)
    return read_command_line(classes[architecture], script=f"{script} {architecture}", intro=intro, argv=rest)


def run_main(main: Callable[[Config], int | None], config: Config) -> None:
    """Call `main(config)` and end the process with the status that it returns, if that is not 0.

    A UserError is printed without a traceback and ends in status 2. A signal ends in status 128 + its number, with one line
    that says what was stopped, what is kept and how to go on; of several processes only the first one prints it.
    """
    gc.enable()
    terminal.prepare()
    terminal.report_lost_streams()
    try:
        with stopping.stoppable():
            status = _main(main, config)
    except UserError as error:
        _say(f"error: {error}")
        raise SystemExit(2) from None
    except stopping.Stopped as stop:
        if stopping.is_first():
            _say(str(stop))
        raise SystemExit(stop.exit_status) from None
    if status:
        raise SystemExit(status)


def _main(main: Callable[[Config], int | None], config: Config) -> int | None:
    """The status of `main(config)`. Any error that a stop led to is that stop, but for a UserError, which says what is not kept."""
    try:
        return main(config)
    except (UserError, stopping.Stopped):
        raise
    except KeyboardInterrupt as error:  # from a handler that a library has put in place
        raise stopping.cause(error) or stopping.Stopped(signal.SIGINT) from None
    except Exception as error:
        if stop := stopping.cause(error):
            raise stop from None
        raise


def _say(text: str) -> None:
    """Prints lines on stderr, below the progress bars that an error has left open."""
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()
    terminal.say(*text.split("\n"), file=sys.stderr)
