"""`make pages` where there is no Chromium, and without a page."""

import pytest

from demo import page_pictures
from sushi_research.errors import UserError


def test_without_a_browser_or_a_page(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="has no report.html"):
        page_pictures.main(tmp_path)
    (tmp_path / "report.html").touch()
    monkeypatch.setattr(page_pictures.shutil, "which", lambda _: None)
    assert page_pictures.main(tmp_path) == 0
    assert capsys.readouterr().out.startswith("no pictures: none of chromium, ")
