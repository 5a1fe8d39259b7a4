"""Fixtures come from the plugin itself, installed as it is for everybody."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _schemas_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FERRY_SCHEMAS", str(Path(__file__).parent))
