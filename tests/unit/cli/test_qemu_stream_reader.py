"""QEMU's migration stream, by a sample that a real QEMU 7.2 wrote (tests/data): whole, cut off anywhere, damaged anywhere."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.cli.main import main
from migrate.qemu.stream import DBUS_VMSTATE, StreamSummary, is_stream, read
from migrate.state import blob, catalog

SAMPLE = gzip.decompress((Path(__file__).parents[2] / "data" / "qemu-7.2.stream.gz").read_bytes())


def summary_of(data: bytes) -> StreamSummary:
    found = read(io.BytesIO(data))
    assert (found.complaint is None) == (found.stopped_at == len(data) and found.complaint is None)
    assert 0 <= found.stopped_at <= len(data)
    at = 8
    for section in found.sections:
        assert section.offset == at, "no byte between two sections"
        at += section.size
    return found


def test_every_byte_of_a_real_stream_belongs_to_a_section() -> None:
    assert is_stream(SAMPLE[:4])
    found = summary_of(SAMPLE)
    assert (found.complaint, found.stopped_at) == (None, len(SAMPLE))
    assert found.machine == "pc-i440fx-7.2"
    assert sum(section.size for section in found.sections) + 8 == len(SAMPLE)
    assert [section.kind for section in found.sections[:4]] == ["configuration", "start", "part", "end"]
    assert found.sections[-1].name == "description"
    names = [section.name for section in found.sections]
    assert {"ram", "timer", "cpu", DBUS_VMSTATE, "0000:00:01.1/ide"} <= set(names)
    assert found.ram is not None
    assert ("pc.ram", 1 << 20) in found.ram.blocks
    assert found.ram.pages_full * 4096 == found.ram.bytes
    assert (found.ram.pages_full + found.ram.pages_zero) * 4096 >= sum(size for _, size in found.ram.blocks)


def test_each_helpers_blob_is_found_where_it_lies_and_read() -> None:
    found = summary_of(SAMPLE)
    assert {helper.id for helper in found.helpers} == {"uart0", "rtc0"}
    for helper in found.helpers:
        assert SAMPLE[helper.offset : helper.offset + len(helper.data)] == helper.data
        made = blob.unpack(helper.data)
        assert made.instance == helper.id
        assert blob.read(helper.data, catalog.load(made.type))[0].version == made.version


def test_a_stream_that_was_cut_off_is_read_as_far_as_it_goes() -> None:
    whole = summary_of(SAMPLE)
    sizes = [*range(0, 260), *range(260, len(SAMPLE), 4999), len(SAMPLE) - 1]
    for size in sizes:
        found = summary_of(SAMPLE[:size])
        assert found.complaint, size
        # The last may lack its footer: not every machine type sends them.
        places = [(section.offset, section.name) for section in found.sections]
        assert places == [(section.offset, section.name) for section in whole.sections[: len(places)]]
    # Without its description the memory and the helpers are still there, if they come before other devices.
    until_helpers = next(section for section in whole.sections if section.name == DBUS_VMSTATE)
    cut = summary_of(SAMPLE[: until_helpers.offset])
    assert cut.ram == whole.ram
    assert "no description" in str(summary_of(SAMPLE[:300000]).complaint)


@given(where=st.integers(0, len(SAMPLE) - 1), value=st.binary(min_size=1, max_size=8))
@settings(max_examples=150)
def test_damage_anywhere_leads_to_no_exception(where: int, value: bytes) -> None:
    summary_of(SAMPLE[:where] + value + SAMPLE[where + len(value) :])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "within its head"),
        (b"QEVX\0\0\0\3", "no migration stream"),
        (b"QEVM\0\0\0\2", "version 2"),
        (b"QEVM\0\0\0\3\x07\xff\xff\xff\xff", "claims 4294967295 bytes"),
        (b"QEVM\0\0\0\3\x02\0\0\0\x09", "never began"),
        (b"QEVM\0\0\0\3\x66", "type 0x66"),
        (b"QEVM\0\0\0\3\x04\0\0\0\1\x03rtc\0\0\0\0\0\0\0\1", "no description"),
        (b"QEVM\0\0\0\3\0more", "no description follows"),
    ],
)
def test_what_makes_no_sense_is_said_with_its_place(data: bytes, says: str) -> None:
    assert says in str(summary_of(data).complaint)


def helpers_section(body: bytes) -> bytes:
    name = DBUS_VMSTATE.encode()
    head = b"QEVM\0\0\0\3\x04\0\0\0\1" + bytes((len(name),)) + name + bytes(8)
    return head + len(body).to_bytes(4, "big") + body


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"\xff\xff\xff\xff", "the number of helpers claims"),
        (b"\0\0\0\1\xff\0\0\0", "a helper's Id claims"),
        (b"\0\0\0\1\0\0\0\1a\xff\0\0\0", "the state of 'a' claims"),
        (b"\0\0\0\1\0\0\0\1a\0\0\1\0", "longer than its section"),
    ],
)
def test_helpers_that_claim_too_much_cost_nothing(body: bytes, says: str) -> None:
    assert says in str(summary_of(helpers_section(body)).complaint)


def test_padding_behind_the_helpers_is_tolerated() -> None:
    found = summary_of(helpers_section(b"\0\0\0\1\0\0\0\1a\0\0\0\2xy" + bytes(40)) + b"\0")
    assert (found.complaint, [(helper.id, helper.data) for helper in found.helpers]) == (None, [("a", b"xy")])


def test_pages_are_passed_over_and_not_kept() -> None:
    page = (0x08).to_bytes(8, "big") + b"\x06pc.ram" + bytes(range(256)) * 16
    big = b"QEVM\0\0\0\3\x01\0\0\0\1\x03ram" + bytes(8) + page * 20000 + (0x10).to_bytes(8, "big")
    file = io.BytesIO(big)
    tracemalloc.start()
    found = read(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.ram is not None
    assert found.ram.pages_full == 20000
    assert peak < 40 << 20, "what is kept is the tail that a description could be in, and no page"


# -- ferry blob ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    path = tmp_path / "vm.stream"
    path.write_bytes(SAMPLE)
    return path


def test_show_has_the_stream_and_both_states_decoded(
    stream: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["blob", "show", str(stream)]) == 0
    out = capsys.readouterr().out
    assert "a migration stream of QEMU, machine type pc-i440fx-7.2" in out
    assert "full dbus-vmstate/dbus-vmstate version 0" in out
    assert "pc.ram 1048576 bytes" in out
    for text in ("uart16550 'uart0'", "divisor = 12", "rtc 'rtc0'", "mono_ns = "):
        assert text in out


def test_each_helper_can_be_queried_dumped_and_verified(
    stream: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["blob", "query", ".divisor", str(stream), "--id", "uart0"]) == 0
    assert capsys.readouterr().out == "12\n"
    assert main(["blob", "verify", str(stream), "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["right"] for event in events if event["event"] == "blob"] == [True, True]
    assert events[0]["event"] == "stream"
    assert len(events[0]["helpers"]) == 2
    assert main(["blob", "dump", str(stream), "--id", "rtc0"]) == 0
    assert ".mono_ns" in capsys.readouterr().out
    assert main(["blob", "query", ".divisor", str(stream)]) == 2
    assert "uart0, rtc0" in capsys.readouterr().err


def test_a_stream_that_was_cut_off_shows_where_and_exits_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cut.stream"
    path.write_bytes(SAMPLE[:205000])
    assert main(["blob", "show", str(path)]) == 1
    out = capsys.readouterr().out
    assert "at byte " in out
    assert "pages sent: 49" in out


def test_a_helper_of_somebody_elses_is_opaque_and_no_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.stream"
    path.write_bytes(helpers_section(b"\0\0\0\1\0\0\0\1a\0\0\0\2xy") + b"\0")
    assert main(["blob", "show", str(path)]) == 0
    assert "'a', opaque: 2 bytes that are no vmferry blob" in capsys.readouterr().out
