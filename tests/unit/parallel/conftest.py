"""Ranks of these tests need no engine."""

import pytest


@pytest.fixture(autouse=True)
def skip_preloading_engines(monkeypatch):
    """Start ranks without importing DeepSpeed and both engines first, which takes longer than the tests here."""
    monkeypatch.setattr("support.ranks.preload", lambda: None)
