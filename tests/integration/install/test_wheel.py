"""A wheel built from the tree and installed elsewhere: `ferry` works from any directory, and nothing of the checkout is used.

The interpreter here is the one below the virtual environment, which knows nothing of the checkout; of the environment it gets the
dependencies alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from migrate.state import catalog
from tests.integration.demo.demo_runs import run
from tests.integration.demo.outcomes import check_moved

CHECKOUT = Path(__file__).parents[3]
PYTHON: str = getattr(sys, "_base_executable", sys.executable)


@dataclass(frozen=True, slots=True)
class Installed:
    target: Path
    environment: dict[str, str]

    def run(self, *words: str) -> str:
        """What Python says, started in / with these words."""
        done = subprocess.run(
            [PYTHON, "-P", *words], cwd="/", env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    base = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", base / "dist", CHECKOUT],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    [wheel] = (base / "dist").iterdir()
    target = base / "target"
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel,
        ],
        check=True,
    )  # fmt: skip
    dependencies = base / "dependencies"
    dependencies.mkdir()
    for key in ("purelib", "platlib"):
        for entry in Path(sysconfig.get_path(key)).iterdir():
            link = dependencies / entry.name
            if entry.suffix != ".pth" and "vmferry" not in entry.name and not link.is_symlink():
                link.symlink_to(entry)
    return Installed(target, {**os.environ, "PYTHONPATH": f"{target}{os.pathsep}{dependencies}"})


def test_the_checkout_is_not_to_be_found_and_everything_comes_from_the_wheel(installed: Installed) -> None:
    program = """
import json, sys
import devices, migrate
from importlib.metadata import entry_points
from importlib.resources import files
from devices.vcpu.platform_file import BUILT_IN_GUEST
from migrate.state import catalog
print(json.dumps({
    "path": sys.path,
    "modules": [migrate.__file__, devices.__file__],
    "guest": str(BUILT_IN_GUEST),
    "schemas": {name: str(files("migrate.state") / "schemas" / f"{name}.toml") for name in catalog.types()},
    "digests": {name: catalog.load(name).at(1).digest.hex() for name in catalog.types()},
    "devices": sorted(point.name for point in entry_points(group="vmferry.devices")),
}))
"""
    found = json.loads(installed.run("-c", program))
    assert not [path for path in found["path"] if Path(path) == CHECKOUT]
    for path in (*found["modules"], found["guest"], *found["schemas"].values()):
        assert Path(path).is_relative_to(installed.target), path
        assert Path(path).is_file()
    assert found["digests"] == {name: catalog.load(name).at(1).digest.hex() for name in catalog.types()}
    assert found["schemas"].keys() >= {"uart16550", "rtc", "display", "vcpu"}
    assert Path(found["guest"]).read_bytes() == (CHECKOUT / "devices/vcpu/guest/guest.bin").read_bytes()
    assert set(found["devices"]) >= {"uart16550", "rtc", "display", "vcpu"}


def test_its_command_explains_itself(installed: Installed) -> None:
    said = installed.run(str(installed.target / "bin" / "ferry"), "--help")
    assert "ferry demo" in said
    assert "Moves a running virtual machine" in said
    assert "incompatible" in installed.run("-m", "migrate.cli", "demo", "--help")


def test_its_demo_moves_the_guest(installed: Installed) -> None:
    played = run(
        ["--downtime", "5000"], command=[PYTHON, "-P", "-m", "migrate.cli"], environment=installed.environment
    )
    check_moved(played)
    assert played.left == []
    assert {process.words[0] for process in played.processes if "-m" in process.words} == {PYTHON}
