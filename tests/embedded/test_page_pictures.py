"""`make pages`: what a terminal shows, and what is said where there is no Chromium or no page."""

import pytest

from demo import page_pictures, terminal_picture
from sushi_research.errors import UserError


def test_without_a_browser_or_a_page(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="has no report.html"):
        page_pictures.main(tmp_path)
    (tmp_path / "report.html").touch()
    with pytest.raises(UserError, match="_data.html is missing: scripts/inspect_data.py"):
        page_pictures.main(tmp_path)
    tmp_path.with_name(f"{tmp_path.name}_data.html").touch()
    monkeypatch.setattr(page_pictures.shutil, "which", lambda _: None)
    assert page_pictures.main(tmp_path) == terminal_picture.main() == 0
    assert capsys.readouterr().out.count("no pictures: none of chromium, ") == 2


def test_a_terminal_shows_bars_as_they_end():
    screen = terminal_picture.Screen(columns=12)
    for part in (
        "plan\r\n50%|#    |\r",
        "99%|#### |\r\x1b",
        "[",
        "K100%\r\n",
        "\ninner\x1b[Aouter\x1b[32m!",
        "\r\nabcdefghijklmn",
    ):
        screen.write(part)
    # A bar is overwritten and its rest erased, the bar above is written after the one below, long lines wrap.
    assert screen.lines == ["plan", "100%", "     outer!", "abcdefghijkl", "mn"]
