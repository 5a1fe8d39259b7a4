"""README tells the truth where a machine can see it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_device_of_ones_own_is_the_one_that_the_kits_tests_move() -> None:
    shown = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert shown is not None
    assert shown[1] == (ROOT / "tests/integration/kit/counter.py").read_text()


def test_every_page_it_points_to_is_there() -> None:
    for page in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / page).exists(), page


def test_every_command_it_names_is_one() -> None:
    from migrate.cli.main import COMMANDS

    named = set(re.findall(r"^\s+ferry ([a-z]+)", README, re.MULTILINE))
    assert named
    assert named <= set(COMMANDS), named - set(COMMANDS)


def test_every_make_target_it_names_is_one() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z]+)", README)) <= targets
