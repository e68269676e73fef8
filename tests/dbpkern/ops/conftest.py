import pytest

from dbpkern.ops import _dispatch
from dbpkern.ops._dispatch import Tiles


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that small matrices have several, of every kind of operands."""
    monkeypatch.setattr(_dispatch, "tiles", lambda *_: Tiles(16, 16, 16, 4, 2))
