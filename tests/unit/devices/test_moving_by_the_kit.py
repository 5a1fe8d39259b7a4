"""Each device through the kit's runtime, from RUNNING here to RUNNING there, and what versions of it take from another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from passage import payload_of, run, runtime

from devices.display import COMMAND, FILL, Display
from devices.kit import Device
from devices.rtc import Rtc
from devices.uart16550 import Uart16550
from migrate.errors import DeviceRefused
from migrate.state.blob import header_of

MAKE: dict[str, Callable[[], Device]] = {
    "uart16550": lambda: Uart16550("dev0"),
    "rtc": lambda: Rtc("dev0"),
    "display": lambda: Display("dev0", {"vram": "1M"}),
}

#: Stores (offset, size, value) that make a state of each which is not the one after a reset.
USE: dict[str, list[tuple[int, int, int]]] = {
    "uart16550": [
        (2, 1, 0x81),
        (4, 1, 0x1F),
        (1, 1, 0x0F),
        *((0, 1, byte) for byte in b"in the FIFO"),
        (7, 1, 9),
    ],
    "rtc": [(0x10, 8, 2**63), (0x18, 4, 1), (0x20, 8, 0xFEED)],
    "display": [(0x24, 4, 100), (0x20, 4, 1024), (0x30, 4, 0xFF0000FF), (COMMAND, 4, FILL)],
}

#: Of each a state in which every field differs from that after a reset.
FULL: dict[str, dict[str, object]] = {
    "uart16550": {
        "ier": 0x0F,
        "iir_thre_pending": True,
        "fcr": 0x89,
        "lcr": 0x9B,
        "mcr": 0x1A,
        "lsr_errors": 0x02,
        "msr": 0x95,
        "scr": 0x5A,
        "divisor": 0x1234,
        "rx_fifo": b"received",
        "tx_fifo": b"not yet sent",
        "rx_trigger": 8,
        "rx_timeout_pending": True,
        "irq_raised": True,
    },
    "rtc": {
        "guest_ns": 1_700_000_000_123_456_789,
        "mono_ns": 98765,
        "alarm_ns": 2**64 - 1,
        "alarm_enabled": True,
        "alarm_fired": True,
        "scratch": 2**63,
        "half_read": {"time_high": 3, "mono_high": 4},
    },
    "display": {
        "width": 640,
        "height": 480,
        "stride": 2560,
        "fill_x": 1,
        "fill_y": 2,
        "fill_w": 3,
        "fill_h": 4,
        "fill_colour": 5,
        "frames": 2**64 - 1,
        "fence_gpa": 8,
        "fence_value": 9,
        "irq_pending": True,
        "src_x": 10,
        "src_y": 11,
        "checksum": 12,
        "refused": True,
    },
}
#: Of each what no guest changes.
FIXED: dict[str, set[str]] = {"uart16550": set(), "rtc": set(), "display": {"format", "vram_bytes"}}


@pytest.mark.parametrize("type_name", MAKE)
def test_every_field_of_a_state_is_taken_over_and_given_again(type_name: str) -> None:
    device = MAKE[type_name]()
    before = device.save()
    state = before | FULL[type_name]
    assert {name for name in state if state[name] == before[name]} == FIXED[type_name]
    device.check(state)
    device.load(state)
    assert device.save() == state
    payload_of(device)


def use(device: Device) -> None:
    for offset, size, value in USE[device.type]:
        with device.lock:
            device.write(0, offset, size, value)


def move(source: Device, destination: Device) -> None:
    """As a coordinator does it: up to where the destination has applied everything and stands in STOP."""
    old, new = runtime(source), runtime(destination)
    new.set_state("RESUMING")
    old.set_state("PRE_COPY")
    old.set_state("STOP_COPY")
    if old.streams:
        while (chunk := old.stream_read(1 << 20))[1]:
            new.stream_write(*chunk[:2])
    new.stage(old.save_as(old.format.version.version))
    new.apply()
    new.set_state("STOP")


@pytest.mark.parametrize("type_name", MAKE)
def test_a_device_arrives_with_the_same_fingerprint_and_both_sides_could_run(type_name: str) -> None:
    source, destination = MAKE[type_name](), MAKE[type_name]()
    run(source)
    blank = runtime(destination).fingerprint()
    use(source)
    move(source, destination)
    assert runtime(destination).fingerprint() == runtime(source).fingerprint() != blank
    for device in (source, destination):
        run(device)
        runtime(device).set_state("STOP")
        device.close()


@pytest.mark.parametrize("type_name", MAKE)
def test_saving_a_running_device_changes_nothing_and_it_runs_on(type_name: str) -> None:
    device = MAKE[type_name]()
    run(device)
    use(device)
    clocks = {"guest_ns", "mono_ns"}
    before, after = ({k: v for k, v in device.save().items() if k not in clocks} for _ in range(2))
    assert before == after
    assert device.state == "RUNNING"
    runtime(device).set_state("STOP")
    device.close()


@pytest.mark.parametrize("type_name", MAKE)
def test_a_state_of_another_type_or_a_changed_one_is_refused_and_nothing_is_loaded(type_name: str) -> None:
    source, destination = MAKE[type_name](), MAKE[type_name]()
    run(source)
    use(source)
    runtime(source).set_state("STOP")
    payload = bytearray(runtime(source).save_as(runtime(source).format.version.version))
    runtime(destination).set_state("RESUMING")
    before = destination.save()
    payload[-1] ^= 1
    with pytest.raises(Exception, match="checksum") as caught:
        runtime(destination).stage(bytes(payload))
    assert caught.value.remedy  # type: ignore[attr-defined]
    assert destination.save() == before
    for device in (source, destination):
        device.close()


def test_an_older_uart_refuses_the_newer_state_and_says_which_versions_it_reads() -> None:
    new, old = Uart16550("dev0"), Uart16550("dev0")
    runtime(old, max_version=1).set_state("RESUMING")
    run(new)
    use(new)
    runtime(new).set_state("STOP")
    with pytest.raises(DeviceRefused, match="reads uart16550 version 1, and the blob is version 2"):
        runtime(old).check_incoming(runtime(new).save_as(2))
    with pytest.raises(DeviceRefused, match="writes uart16550 version 2, 3, not 1"):
        runtime(new).save_as(1)


@pytest.mark.parametrize(("type_name", "older"), [("uart16550", 2), ("rtc", 1), ("rtc", 2)])
def test_a_device_writes_the_version_that_an_older_release_reads_and_nothing_is_lost(
    type_name: str, older: int
) -> None:
    source, destination, back = MAKE[type_name](), MAKE[type_name](), MAKE[type_name]()
    state = source.save() | FULL[type_name]
    source.load(state)
    written = runtime(source).save_as(older)
    assert header_of(written).version == older
    old = runtime(destination, max_version=older)
    assert older in old.format.readable
    old.set_state("RESUMING")
    old.stage(written)
    old.apply()
    old.set_state("STOP")
    assert old.fingerprint() == runtime(source).fingerprint(older)
    # And home again: what the older release had no name for was not needed, or has a place there.
    home = runtime(back)
    home.set_state("RESUMING")
    home.stage(old.save_as(older))
    home.apply()
    assert back.save() == state
    for device in (source, destination, back):
        device.close()


@pytest.mark.parametrize("newest", [1, 2, 3])
def test_a_state_of_version_1_loads_and_its_receive_trigger_is_kept(newest: int) -> None:
    source, destination = Uart16550("dev0"), Uart16550("dev0")
    runtime(source, max_version=1)
    runtime(destination, max_version=newest)
    run(source)
    use(source)
    move(source, destination)
    assert destination.save() | {"irq_raised": True} == source.save() | {"irq_raised": True}
    assert destination.save()["rx_trigger"] == 8
