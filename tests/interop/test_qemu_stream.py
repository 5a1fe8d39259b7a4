"""A migration stream that a real QEMU writes here and now, with two of our device processes attached: read to the last byte."""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path

import pytest

from migrate.qemu.stream import read
from migrate.state import blob, catalog

DATA = Path(__file__).parents[1] / "data"
sys.path.insert(0, str(DATA))
import make_stream  # noqa: E402

pytestmark = pytest.mark.skipif(
    shutil.which(make_stream.QEMU) is None,
    reason=f"{make_stream.QEMU} is not installed: apt-get install qemu-system-x86",
)


def test_a_stream_of_qemu_shows_what_our_devices_saved(tmp_path: Path) -> None:
    path = tmp_path / "vm.stream"
    saved = asyncio.run(make_stream.make(path, memory="16M"))
    with path.open("rb") as file:
        found = read(file)
    assert (found.complaint, found.stopped_at) == (None, path.stat().st_size)
    assert {helper.id: helper.data for helper in found.helpers} == saved
    for helper in found.helpers:
        assert blob.read(helper.data, catalog.load(blob.unpack(helper.data).type))[1]
    assert sum(section.size for section in found.sections) + 8 == path.stat().st_size
    assert found.ram is not None
    assert ("pc.ram", 16 << 20) in found.ram.blocks


def test_devices_that_are_stopped_say_the_same_to_qemu_as_to_us(tmp_path: Path) -> None:
    path = tmp_path / "vm.stream"
    saved = asyncio.run(
        make_stream.make(path, devices={"disk1": "devices.uart16550", "clock": "devices.rtc"})
    )
    with path.open("rb") as file:
        assert {helper.id: helper.data for helper in read(file).helpers} == saved
