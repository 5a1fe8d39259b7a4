"""`ferry blob` on blobs that are whole, damaged, cut off, too new, of types that nobody knows, and on what is none."""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
import tracemalloc
from pathlib import Path

import pytest

from migrate.cli.main import main
from migrate.state import blob, catalog, chunks
from migrate.state.blob import Blob
from tests.fuzz.mutate import inputs

GOLDEN = Path(__file__).parents[2] / "golden"
UART, OLD_UART, RTC = (GOLDEN / f"{name}.blob" for name in ("uart16550-v2", "uart16550-v1", "rtc-v1"))


def ferry(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["blob", *map(str, words)])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.out, said.err


def objects(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def spoilt(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "spoilt.blob"
    path.write_bytes(data)
    return path


def test_show_has_every_field_with_its_value_and_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ferry(capsys, "show", UART)
    assert code == 0
    assert "uart16550 'uart165500', schema version 2" in out
    for field in catalog.load("uart16550").at(2).fields:
        assert f"{field.name} = " in out
        assert field.doc.split("\n")[0] in out


def test_show_as_json_has_the_state_that_a_device_would_load(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = ferry(capsys, "show", UART, "--json")
    [shown, outcome] = objects(out)
    _, state = blob.read(UART.read_bytes(), catalog.load("uart16550"))
    values = {item["path"].lstrip("."): item["value"] for item in shown["values"]}  # type: ignore[attr-defined]
    assert values == {
        name: {"hex": value.hex()} if isinstance(value, bytes) else value for name, value in state.items()
    }
    assert outcome == {"event": "outcome", "outcome": "done", "exit_code": 0}


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.blob")), ids=lambda path: path.stem)
def test_dump_shows_every_byte_once(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ferry(capsys, "dump", path)
    assert code == 0
    rows = out.splitlines()[1:]
    shown = b"".join(bytes.fromhex(row[6:54]) for row in rows)
    assert shown == path.read_bytes()
    at = 0
    for row in rows:
        assert int(row[:4], 16) == at
        at += len(bytes.fromhex(row[6:54]))


def test_dump_of_a_range_shows_that_range(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = ferry(capsys, "dump", UART, "--range", "0x10:0x34")
    shown = b"".join(bytes.fromhex(row[6:54]) for row in out.splitlines()[1:])
    assert shown == UART.read_bytes()[0x10:0x34]
    code, _, err = ferry(capsys, "dump", UART, "--range", "here:there")
    assert code == 2
    assert "0x40:0x80" in err


def test_colours_are_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\x1b[" not in ferry(capsys, "dump", UART)[1]
    assert "\x1b[" in ferry(capsys, "dump", UART, "--colour", "always")[1]


def test_query_answers_with_the_value_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert ferry(capsys, "query", ".dll", UART) == (0, "1\n", "")
    fifo = blob.read(UART.read_bytes(), catalog.load("uart16550"))[1]["rx_fifo"]
    assert isinstance(fifo, bytes)
    assert ferry(capsys, "query", ".rx_fifo[3]", UART) == (0, f"{fifo[3]}\n", "")
    assert ferry(capsys, "query", ".rx_fifo", UART) == (0, f"{fifo.hex()}\n", "")
    assert ferry(capsys, "query", ".irq_raised", UART)[1] in ("true\n", "false\n")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (".nsr", "the nearest is .scr"),
        (".dll.x", "no fields"),
        (".rx_fifo[99]", "items"),
        ("dll", "write it as"),
        (".dll[0]", "no list"),
    ],
)
def test_a_path_that_leads_nowhere_says_where_it_goes_wrong(
    path: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = ferry(capsys, "query", path, UART)
    assert (code, out) == (2, "")
    assert says in err


def test_diff_has_the_exit_codes_of_diff_also_between_versions(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert ferry(capsys, "diff", UART, UART) == (0, "", "")
    code, out, err = ferry(capsys, "diff", OLD_UART, UART)
    assert code == 1
    assert ".rx_trigger: (not there) → " in out
    assert "schema version 1 against 2" in err
    code, out, err = ferry(capsys, "diff", UART, RTC)
    assert (code, out) == (2, "")
    assert "uart16550" in err
    assert "rtc" in err
    assert ferry(capsys, "diff", UART, spoilt(tmp_path, UART.read_bytes()[:-9]))[0] == 2


def test_verify_says_what_is_wrong_of_each(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert ferry(capsys, "verify", GOLDEN)[0] == 0
    (tmp_path / "good.blob").write_bytes(RTC.read_bytes())
    data = bytearray(UART.read_bytes())
    data[90] ^= 1
    spoilt(tmp_path, bytes(data))
    code, out, _ = ferry(capsys, "verify", tmp_path)
    assert code == 1
    assert [line[:6] for line in out.splitlines()] == ["[ OK ]", "[FAIL]"]
    assert "checksum" in out


def test_a_blob_that_was_cut_off_is_shown_up_to_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = spoilt(tmp_path, UART.read_bytes()[:100])
    for action in ("show", "dump"):
        code, out, _ = ferry(capsys, action, path)
        assert code == 1
        assert "ier" in out
        assert "cut off" in out


def test_a_type_that_nobody_knows_is_shown_as_it_stands_in_the_blob(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    made = blob.unpack(UART.read_bytes())
    path = spoilt(tmp_path, blob.pack(Blob("frobnicator", "f0", 7, made.digest, made.payload)))
    code, out, _ = ferry(capsys, "show", path)
    assert code == 0
    assert "no schema for device type 'frobnicator'" in out
    assert "dll = 1" in out


def test_info_reads_an_envelope_that_is_too_new(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = bytearray(UART.read_bytes())
    data[9] = 9
    code, out, _ = ferry(capsys, "info", spoilt(tmp_path, bytes(data)))
    assert code == 1
    assert "uart16550" in out
    assert "envelope version 9" in out
    assert ferry(capsys, "info", UART)[0] == 0


def test_upgrade_writes_what_a_device_of_that_version_reads_and_refuses_what_would_be_lost(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out.blob"
    assert ferry(capsys, "upgrade", OLD_UART, "--to", 2, "-o", out)[0] == 0
    version, values = blob.read(out.read_bytes(), catalog.load("uart16550"))
    assert version.version == 2
    assert ferry(capsys, "upgrade", out, "--to", 1, "-o", tmp_path / "back.blob")[0] == 0
    assert (tmp_path / "back.blob").read_bytes() == OLD_UART.read_bytes()
    needed = blob.write(version, "uart0", {**values, "irq_raised": True})
    code, _, err = ferry(capsys, "upgrade", spoilt(tmp_path, needed), "--to", 1, "-o", tmp_path / "no.blob")
    assert code == 1
    assert ".irq_raised is needed" in err
    assert not (tmp_path / "no.blob").exists()
    code, _, err = ferry(capsys, "upgrade", UART, "--to", 99, "-o", out)
    assert code == 1
    assert "no schema version 99" in err


def test_a_redacted_blob_has_nothing_of_the_guest_and_is_still_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out.blob"
    assert ferry(capsys, "redact", UART, "-o", out)[0] == 0
    before, after = (blob.read(path.read_bytes(), catalog.load("uart16550"))[1] for path in (UART, out))
    assert {name for name in before if before[name] != after[name]} == {"rx_fifo", "tx_fifo"}
    assert isinstance(after["rx_fifo"], bytes)
    assert set(after["rx_fifo"]) == {0}
    assert len(before["rx_fifo"]) == len(after["rx_fifo"])  # type: ignore[arg-type]
    assert ferry(capsys, "redact", UART, "--numbers", "-o", out)[0] == 0
    assert ferry(capsys, "query", ".dll", out)[1] == "0\n"


def test_standard_input_is_read(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(RTC.read_bytes())))
    assert ferry(capsys, "verify", "-")[:2] == (0, "[ OK ] standard input: rtc 'rtc0', schema version 1\n")


@pytest.mark.parametrize(
    ("what", "says"),
    [("nowhere.blob", "cannot be read"), ("/dev/null", "no vmferry state blob"), ("/proc", "has no blob")],
)
def test_what_is_no_blob_is_one_line(what: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = ferry(capsys, "show", what)
    assert code in (1, 2)
    assert says in out + err


def test_of_several_blobs_one_is_chosen_by_its_id(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = ferry(capsys, "query", ".dll", GOLDEN)
    assert code == 2
    assert "choose one by --id" in err
    assert ferry(capsys, "query", ".gpr", GOLDEN, "--id", "vcpu0")[0] == 0


def test_no_damage_leads_to_a_traceback_or_to_silence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "spoilt.blob"
    for number, data in enumerate(inputs([UART.read_bytes(), RTC.read_bytes()], 5)):
        path.write_bytes(data)
        for action in ("show", "dump", "verify", "info"):
            code, out, err = ferry(capsys, action, path)
            assert code in (0, 1, 2)
            assert out or err
        if number > 150:
            break


def test_a_blob_of_very_many_values_or_bytes_is_shown_and_dumped_without_being_held(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = blob.unpack(UART.read_bytes())
    many = b"\x81\xa1a\xdd" + (1 << 16).to_bytes(4, "big") + bytes(1 << 16)  # a list of zeros
    big = b"\x81\xa1a\xc6" + (1 << 20).to_bytes(4, "big") + bytes(1 << 20)
    for payload, action in ((many, "show"), (big, "dump")):
        path = spoilt(tmp_path, blob.pack(Blob("frobnicator", "f0", 1, made.digest, payload)))
        with open(os.devnull, "w") as nowhere:
            monkeypatch.setattr(sys, "stdout", nowhere)
            tracemalloc.start()
            assert main(["blob", action, str(path)]) == 0
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            monkeypatch.undo()
        assert peak < 2 << 20, action


# -- what devices streamed -------------------------------------------------------------------------------------------------------


def kept(path: Path, data: bytes, size: int = 5000) -> Path:
    """A file as `--keep` leaves it, of a bridge that knows nothing of its data."""
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    packed = [chunks.pack(number, part, last=False) for number, part in enumerate(parts)]
    path.write_bytes(chunks.KEPT + b"".join(map(chunks.keep, packed)))
    return path


def test_streamed_state_of_a_qemu_is_shown_by_its_sections(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    stream = gzip.decompress((GOLDEN.parent / "data" / "qemu-7.2.stream.gz").read_bytes())
    (tmp_path / "scsi0.blob").write_bytes((GOLDEN / "x-remote-v1.blob").read_bytes())
    kept(tmp_path / "scsi0.chunks", stream)
    code, out, _ = ferry(capsys, "show", tmp_path)
    assert code == 0
    assert f"scsi0.chunks: streamed state, {-(-len(stream) // 5000)} chunks, {len(stream)} bytes" in out
    assert "a migration stream of QEMU" in out
    assert "full dbus-vmstate/dbus-vmstate" in out
    assert "x-remote 'x-remote0', schema version 1" in out
    _, out, _ = ferry(capsys, "show", tmp_path / "scsi0.chunks", "--json")
    streamed, found, outcome = objects(out)
    assert (streamed["bytes"], found["event"], outcome["exit_code"]) == (len(stream), "stream", 0)


def test_streamed_state_that_is_cut_off_or_nobodys_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = kept(tmp_path / "disk0.chunks", bytes(12_000))
    code, out, _ = ferry(capsys, "show", path)
    assert (code, "3 chunks, 12000 bytes" in out, "QEMU" in out) == (0, True, False)
    path.write_bytes(path.read_bytes()[:-1])
    code, out, _ = ferry(capsys, "show", path)
    assert code == 1
    assert "2 chunks, 10000 bytes" in out
    assert "cut off at byte 10048: 2019 bytes are no whole chunk" in out


def test_a_device_that_was_reset_on_its_way_has_what_came_after(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    stream = gzip.decompress((GOLDEN.parent / "data" / "qemu-7.2.stream.gz").read_bytes())
    path = kept(tmp_path / "scsi0.chunks", stream)
    again = path.read_bytes()
    path.write_bytes(again[: len(chunks.KEPT) + 5020] + again[len(chunks.KEPT) :])
    code, out, _ = ferry(capsys, "show", path)
    assert (code, "full dbus-vmstate/dbus-vmstate" in out) == (0, True)
