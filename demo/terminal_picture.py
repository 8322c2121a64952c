"""A picture of a terminal while the demo trains, docs/images/terminal.png, by headless Chromium: `make pages`.

The demo is run in a pseudo-terminal until most of it is done, and is then stopped; its run folder is removed.
"""

from __future__ import annotations

import html
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

from demo.page_pictures import IMAGES, browser, take
from demo.records import ROOT
from sushi_research.errors import UserError

COLUMNS, ROWS = 150, 44
NAME = "mystar"
COMMAND = "python scripts/train_sd15_lora.py --config configs/demo_sd15.yaml --config configs/demo/star.yaml"
SETTINGS = f"--run.name {NAME} --train.steps 120 --sample.every 40 --checkpoint.every 40 --tracking.wandb off"
# What is on the screen when the picture is taken.
UNTIL = re.compile(r"training:?\s+8\d%")
STYLE = "margin:0;padding:14px 18px;background:#101614;color:#dfe6e3;font:13px/1.38 'DejaVu Sans Mono',monospace"
# In CSS pixels, for that style: the width of the columns, and the height of a line.
WIDTH, LINE = 1215, 18


class Screen:
    """The lines of a terminal: what a program's output looks like, as far as progress bars need it."""

    def __init__(self, columns: int) -> None:
        self.lines, self.row, self.column, self.columns = [""], 0, 0, columns
        self._rest = ""

    def write(self, text: str) -> None:
        """Shows text: letters, line breaks, carriage returns, and the escape sequences that move up or erase a line's rest."""
        text = self._rest + text
        cut = re.search(r"\x1b(\[[0-9;?]*)?$", text)
        self._rest, text = (text[cut.start() :], text[: cut.start()]) if cut else ("", text)
        for code, kind, letter in re.findall(r"\x1b\[([0-9;?]*)([A-Za-z])|([^\x1b])", text):
            if letter:
                self._letter(letter)
            elif kind == "A":
                self.row = max(0, self.row - int(code or 1))
            elif kind == "K":
                self.lines[self.row] = self.lines[self.row][: self.column]

    def _letter(self, letter: str) -> None:
        if letter == "\r":
            self.column = 0
            return
        if letter == "\n" or self.column == self.columns:
            self.row, self.column = self.row + 1, 0
            self.lines += [""] * (self.row + 1 - len(self.lines))
        if letter.isprintable():
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + letter + line[self.column + 1 :]
            self.column += 1


def main() -> int:
    """Writes the picture; returns 0, also where there is no Chromium. UserError if the demo ends before."""
    if (found := browser()) is None:
        return 0
    screen = Screen(COLUMNS)
    screen.write(f"$ {COMMAND} ...\r\n")
    try:
        _train(screen)
    finally:
        shutil.rmtree(ROOT / "runs" / NAME, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "terminal.html")
        shown = screen.lines[-ROWS:]
        text = html.escape("\n".join(shown))
        page.write_text(
            f'<meta charset="utf-8"><body style="{STYLE}"><pre style="margin:0">{text}</pre>', encoding="utf-8"
        )
        take(found, page, IMAGES / "terminal.png", (WIDTH, LINE * len(shown) + 28, 1))
    return 0


def _train(screen: Screen) -> None:
    """Runs the demo until UNTIL is on the screen."""
    parent, child = pty.openpty()
    ioctl(child, TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    words = [sys.executable, *COMMAND.split()[1:], *SETTINGS.split()]
    environment = os.environ | {"COLUMNS": str(COLUMNS), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, cwd=ROOT, stdin=child, stdout=child, stderr=child, env=environment)
    os.close(child)
    try:
        while not any(map(UNTIL.search, screen.lines[-ROWS:])):
            if process.poll() is not None:
                raise UserError(
                    f"the demo ended with status {process.returncode} before the picture: {screen.lines[-1]}"
                )
            if select.select([parent], [], [], 1.0)[0]:
                screen.write(os.read(parent, 65536).decode(errors="replace"))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.close(parent)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
