"""Studies of tests have tiny presets."""

import pytest
from studies import shrink


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch.setitem)
