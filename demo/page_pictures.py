"""Pictures of pages in docs/images, by headless Chromium: of a run and of its data, on a desktop and on a phone; and the print of
the run's page, next to it.

python -m demo.page_pictures runs/demo_sd15_star    # `make pages`
"""

from __future__ import annotations

import html
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from demo.records import ROOT
from sushi_research.errors import UserError
from sushi_research.files import write_image

IMAGES = ROOT / "docs/images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Name -> width and height in CSS pixels, and pixels of the picture for each of them.
SCREENS = {"report_desktop": (1200, 1500, 1), "report_phone": (390, 1560, 2)}
DATA_SCREENS = {"data_desktop": (1200, 2600, 1), "data_phone": (390, 1560, 2)}
# A window of headless Chromium is at least so wide, so a narrower page is a frame in it.
NARROWEST = 500


def main(run: Path) -> int:
    """Writes the pictures; returns 0, also where there is no Chromium. UserError if a page is missing or Chromium fails."""
    page, data = run.resolve() / "report.html", run.resolve().with_name(f"{run.name}_data.html")
    if not page.is_file():
        raise UserError(f"{run} has no report.html: `make demo ARCH=sd15` trains a run and writes it.")
    if not data.is_file():
        raise UserError(f"{data} is missing: scripts/inspect_data.py with the config of {run} writes it.")
    if (found := browser()) is None:
        return 0
    take_all(found, page, SCREENS)
    take_all(found, data, DATA_SCREENS)
    printed = page.with_suffix(".pdf")
    _browse(found, page, "--no-pdf-header-footer", f"--print-to-pdf={printed}")
    print(f"written: {printed}")
    return 0


def take_all(browser: str, page: Path, screens: Mapping[str, tuple[int, int, int]]) -> None:
    """Writes a picture of the top of a page for each screen."""
    with tempfile.TemporaryDirectory() as folder:
        for name, (width, height, scale) in screens.items():
            frame = Path(folder, "frame.html")
            style = f"width:{width}px;height:{height}px;border:0"
            source = html.escape(page.as_uri())
            frame.write_text(f'<body style="margin:0"><iframe scrolling="no" src="{source}" style="{style}"></iframe>')
            take(browser, frame, IMAGES / f"{name}.png", (width, height, scale))


def browser() -> str | None:
    """The path of Chromium; None, with a sentence on the terminal, if there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        print(f"no pictures: none of {', '.join(BROWSERS)} is installed")
    return found


def take(browser: str, page: Path, picture: Path, screen: tuple[int, int, int]) -> None:
    """Writes a picture of the top of a page. `screen`: width and height in CSS pixels, and pixels of the picture for each."""
    width, height, scale = screen
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder, "shot.png")
        window = f"--window-size={max(width, NARROWEST)},{height}"
        _browse(browser, page, window, f"--force-device-scale-factor={scale}", f"--screenshot={shot}")
        with Image.open(shot) as image:
            write_image(picture, image.convert("RGB").crop((0, 0, width * scale, height * scale)))
    print(f"written: {picture}")


def _browse(browser: str, page: Path, *options: str) -> None:
    """Runs headless Chromium on a page. UserError if it ends with an error."""
    # As root, as in a container, it starts only without its sandbox; the page is our own and loads nothing.
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise UserError(f"{browser} failed with status {done.returncode}: {' '.join(done.stderr.split())[-300:]}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("error: give the folder of a run that has a page, for example runs/demo_sd15_star.")
    try:
        sys.exit(main(Path(sys.argv[1])))
    except UserError as error:
        sys.exit(f"error: {error}")
