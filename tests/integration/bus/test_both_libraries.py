"""Everything in this directory once more, with the other of the two D-Bus libraries."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from migrate.bus import library

OTHER = "next" if library.FAST else "fast"


@pytest.mark.skipif(
    importlib.util.find_spec(f"dbus_{OTHER}") is None,
    reason=f"dbus-{OTHER} is not installed: pip install vmferry[fast]",
)
def test_the_other_library_passes_the_same_tests() -> None:
    here = Path(__file__)
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            str(here.parent),
            f"--ignore={here}",
        ],
        env=os.environ | {"FERRY_DBUS": OTHER},
        cwd=here.parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:]


@pytest.mark.parametrize("asked", ["next", "fast"])
def test_only_the_library_that_was_asked_for_is_loaded(asked: str) -> None:
    output = subprocess.run(
        [
            sys.executable,
            "-c",
            "from migrate.bus import library; import sys; print(library.NAME, *sys.modules)",
        ],
        env=os.environ | {"FERRY_DBUS": asked},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    loaded = {"dbus_next", "dbus_fast"} & set(output[1:])
    # dbus-fast is a choice where it is installed, and no more.
    wanted = "dbus_fast" if asked == "fast" and importlib.util.find_spec("dbus_fast") else "dbus_next"
    assert (output[0], loaded) == (wanted, {wanted})
