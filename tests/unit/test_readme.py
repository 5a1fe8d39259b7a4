"""README tells the truth where a machine can see it."""

from __future__ import annotations

import re
import textwrap
import tomllib
from pathlib import Path

import pytest

from migrate.machine import config, hostconfig

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


def test_the_machine_that_it_shows_is_one(tmp_path: Path) -> None:
    shown = re.search(r"```toml\n(.*?)```", README, re.DOTALL)
    assert shown is not None
    machine = config.parse(tomllib.loads(shown[1]), "README", tmp_path)
    assert machine.name == "web1"
    assert [device.type for device in machine.devices] == ["uart16550", "rtc"]


def test_the_files_that_the_page_about_them_shows_are_taken_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostconfig, "MAX_DIRECTORY", 200)
    page = (ROOT / "docs/machine-toml.md").read_text()
    blocks = [textwrap.dedent(block) for block in re.findall(r"((?:^    .*\n|^\n)+)", page, re.MULTILINE)]
    whole, qemu, host = (block.replace(", …", "") for block in blocks if block.strip())
    machine = config.parse(tomllib.loads(whole), "the page", tmp_path)
    assert [device.type for device in machine.devices] == ["uart16550", "vfio-user", "x-remote"]
    head = '[machine]\nname = "web1"\nmemory = "256M"\n'
    assert config.parse(tomllib.loads(head + qemu), "the page", tmp_path).qemu is not None
    (tmp_path / "host.toml").write_text(host)
    offered = hostconfig.load(tmp_path)
    assert offered.images == (Path("/srv/images"),)


def test_every_make_target_it_names_is_one() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z]+)", README)) <= targets
