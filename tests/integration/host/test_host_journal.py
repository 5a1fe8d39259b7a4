"""The journal of a job: whatever is written into it, in whatever pieces, is the same for who follows and who comes later."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import RemoteProtocolError, TransportError
from migrate.host import journal as journal_module
from migrate.host.journal import Journal
from migrate.host.packets import MAX_PACKET, Packets

EVENTS = st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=20), max_size=3)
LINES = st.one_of(
    EVENTS.map(lambda event: json.dumps(event).encode()),
    st.sampled_from(
        [b"", b"no JSON", b"[1]", b'{"event": "outcome"}', b"\xff\xfe", b'{"torn": ', b"[" * 5000]
    ),
)


def is_event(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def read_whole(path: Path) -> list[str]:
    later = Journal(path, lambda *_: None)
    later.pump()
    later.close()
    return later.lines


@given(lines=st.lists(LINES, max_size=12), cuts=st.lists(st.integers(0, 400), max_size=8))
def test_events_are_the_lines_that_are_objects_up_to_the_outcome(lines: list[bytes], cuts: list[int]) -> None:
    data = b"".join(line + b"\n" for line in lines)
    wanted = [line.decode() for line in lines if is_event(line)]
    outcomes = [index for index, line in enumerate(wanted) if json.loads(line).get("event") == "outcome"]
    wanted = wanted[: outcomes[0] + 1] if outcomes else wanted
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "j"
        heard: list[tuple[int, str]] = []
        journal = Journal(path, lambda number, line, _: heard.append((number, line)))
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(data)], strict=True):
            os.write(fd, data[start:end])
            journal.pump()
        os.close(fd)
        journal.close()
        assert heard == list(enumerate(wanted))
        assert journal.lines == read_whole(path) == wanted


def test_an_event_of_ours_survives_half_a_line_of_a_writer_that_was_killed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", lambda *_: None)
    os.write(journal.fileno(), b'{"event": "round"}\n{"event": "pha')
    journal.append({"event": "outcome"})
    assert journal.lines == ['{"event": "round"}', '{"event": "outcome"}'] == read_whole(tmp_path / "j")
    assert journal.outcome == {"event": "outcome"}
    journal.close()


def test_a_line_without_end_costs_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "MAX_LINE", 4096)
    journal = Journal(tmp_path / "j", lambda *_: None)
    for _ in range(64):
        os.write(journal.fileno(), b"x" * 4096)
        journal.pump()
        assert len(journal._partial) <= 2 * 4096
    os.write(journal.fileno(), b'\n{"event": "after"}\n')
    journal.pump()
    assert journal.lines == ['{"event": "after"}']
    journal.close()


def test_packets_carry_descriptors_and_their_end() -> None:
    async def talk() -> None:
        left, right = (Packets(sock) for sock in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        reader, writer = os.pipe()
        await left.send({"page": 1}, [writer], timeout=1)
        os.close(writer)
        received = await right.receive()
        assert received is not None
        packet, [given] = received
        assert packet == {"page": 1}
        assert not os.get_inheritable(given)
        os.write(given, b"x")
        os.close(given)
        assert os.read(reader, 2) == b"x"
        os.close(reader)
        left.close()
        assert await right.receive() is None
        with pytest.raises(TransportError):
            await right.send({}, timeout=1)
        right.close()

    asyncio.run(talk())


@pytest.mark.parametrize("data", [b"[]", b"{", b"\xff", b'{"a": "' + b"x" * MAX_PACKET + b'"}'])
def test_what_is_no_packet_is_said_to_be_none(data: bytes) -> None:
    async def receive() -> Any:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_PACKET)
        with theirs:
            theirs.send(data)
            packets = Packets(ours)
            try:
                await packets.receive()
            finally:
                packets.close()

    with pytest.raises(RemoteProtocolError):
        asyncio.run(receive())
