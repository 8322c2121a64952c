import pytest

from sushi_research import fingerprints


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """No file counts as just changed: a test cannot give a file an old change time."""
    monkeypatch.setattr(fingerprints, "RACY_NS", 0)
