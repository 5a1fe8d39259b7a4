"""The example of docs/how-to-test-a-device.md, run as it stands there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_the_example_of_the_page_passes(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "how-to-test-a-device.md").read_text()
    [example] = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for name in ("counter.py", "counter.toml"):
        shutil.copy(ROOT / "tests" / "integration" / "kit" / name, pytester.path)
    monkeypatch.setenv("FERRY_SCHEMAS", str(pytester.path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile(test_counter=example)
    pytester.runpytest_subprocess().assert_outcomes(passed=2)
