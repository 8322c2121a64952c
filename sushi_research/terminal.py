"""The standard streams: they show any text, and a command does not end because nobody can read them any more.

A reader may go away (`train | head -1`, a `tee` that dies, a closed terminal), the disk of a log may be full, and a descriptor may
be closed from the start (`>&-`). The command then goes on without that output, and says so on the other stream.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from sushi_research.errors import printable, printable_lines

_NAMES = {1: "standard output", 2: "standard error"}
# A full disk may have space again; for any other error the stream is lost.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Lasting(io.FileIO):
    """A standard stream's descriptor. What cannot be written is dropped, and no error is raised."""

    # Not for `--help | head`, where nothing goes on.
    tells = False

    def write(self, data: memoryview | bytes) -> int:
        try:
            while (written := super().write(data)) is None:  # somebody else has made it non-blocking
                select.select([], [self], [])
            return written
        except OSError as error:
            self._lose(error)
            return memoryview(data).nbytes

    def _lose(self, error: OSError) -> None:
        number = self.fileno()
        if error.errno not in _FULL:
            # Child processes and libraries in C, which write to the descriptor itself, then do not fail either.
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), number)
        if self.tells:
            self.tells = False
            line = f"warning: {_NAMES[number]} cannot be written ({error.strerror}): the command goes on without it\n"
            with contextlib.suppress(OSError):
                os.write(3 - number, line.encode())


class _Stream(io.TextIOWrapper):
    """Standard output or standard error over `_Lasting`."""

    # The stream that this one replaces. If it were freed, it could close the descriptor.
    before: TextIO | None = None


def prepare() -> None:
    """Makes the standard streams last and show any text, and warnings safe to show. A second call has no effect.

    Text that the encoding lacks is escaped (`backslashreplace`). A closed descriptor is opened on the null device; otherwise the
    next file that is opened would get its number, and what is printed would land in that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number is this one
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)
    sys.stdout, sys.stderr = _prepared(sys.stdout, 1), _prepared(sys.stderr, 2)
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler and not isinstance(handler.formatter, _PlainFormatter):
            handler.setFormatter(_PlainFormatter("%(levelname)s: %(message)s"))


def report_lost_streams() -> None:
    """From now on a stream that is lost is reported on the other one, once."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _Stream):
            _raw(stream).tells = True


@contextlib.contextmanager
def without_errors_of_c() -> Iterator[None]:
    """Within the block, what libraries in C write to standard error is dropped."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def say(*lines: str, file: TextIO | None = None) -> None:
    """Prints lines whose parts may come from a stranger's file: control characters are escaped (`errors.printable`)."""
    print("\n".join(printable(line) for line in lines), file=file or sys.stdout, flush=True)


class _PlainFormatter(logging.Formatter):
    """Log records for the terminal, with control characters escaped. Our own messages are one line each."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = super().formatMessage(record)
        return printable(text) if record.name.startswith("sushi_research") else printable_lines(text)

    def formatException(self, ei: Any) -> str:
        return printable_lines(super().formatException(ei))


def _prepared(stream: TextIO | None, number: int) -> TextIO:
    """The stream of a descriptor that was closed, or `stream` in its lasting form if it is that of the process."""
    if isinstance(stream, _Stream):
        return stream
    if stream is not None:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        try:
            real = stream.fileno() == number
        except (OSError, ValueError, AttributeError):
            real = False
        # A stream that a program has put in its place (tests, notebooks), or a console of Windows, stays as it is.
        if not real or type(getattr(stream.buffer, "raw", stream.buffer)) is not io.FileIO:
            return stream
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    raw = _Lasting(number, "wb", closefd=False)
    # With `python -u` there is no buffer.
    unbuffered = stream is not None and isinstance(stream.buffer, io.RawIOBase)
    lasting = _Stream(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding="utf-8" if stream is None else stream.encoding,
        errors="backslashreplace",
        line_buffering=number == 2 or (stream is not None and stream.line_buffering),
        write_through=stream is not None and stream.write_through,
    )
    lasting.before = stream
    return lasting


def _raw(stream: _Stream) -> _Lasting:
    return getattr(stream.buffer, "raw", stream.buffer)
