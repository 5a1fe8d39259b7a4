"""exec: destinations: a command's pipes as a channel, its complaints, and its end."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transport_rig import SESSION, in_thread

from migrate.errors import ChannelClosed, UsageError
from migrate.transport import command as command_module
from migrate.transport.channel import Channel
from migrate.transport.control import accept_page, dial_control, dial_page
from migrate.transport.preamble import SIZE, Kind, Preamble, encode
from migrate.transport.uri import ExecDestination


def run(text: str) -> Channel:
    return dial_page(ExecDestination(text), None, SESSION, 2, timeout=10)


def run_after_preamble(text: str) -> Channel:
    """A command that may end by itself: not before it has its preamble."""
    return run(f"head -c {SIZE} >/dev/null; {text}")


def read(channel: Channel, size: int) -> bytes:
    got = bytearray(size)
    channel.recv_into(memoryview(got))
    return bytes(got)


def read_line(channel: Channel) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += read(channel, 1)
    return line


def gone(check: Callable[[], bool]) -> bool:
    """Whether it comes true: a signal takes effect a moment after it was sent."""
    end = time.monotonic() + 20
    while not check() and time.monotonic() < end:
        time.sleep(0.005)
    return check()


def session_is_empty(session: int) -> bool:
    """Whether all its processes are dead; zombies are for init to reap, in its own time."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                state, _, _, its_session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(its_session) == session and state not in "ZX":
                return False
    return True


def test_the_preamble_and_all_pages_go_through_the_command() -> None:
    channel = run("cat")
    assert channel.peer == "exec"
    assert read(channel, SIZE) == encode(Preamble(Kind.PAGE, 2, SESSION))
    pages = os.urandom(8 << 20)
    arriving = in_thread(
        lambda: read(channel, len(pages))
    )  # pipes are two channels, one a direction: two threads may
    channel.send_runs([memoryview(pages)[: 5 << 20], memoryview(pages)[5 << 20 :]])
    assert arriving.result(30) == pages
    channel.close()


def test_a_control_stream_goes_through_a_command_too() -> None:
    async def talk() -> None:
        stream = await dial_control(ExecDestination("cat"), None, SESSION, timeout=10)
        async with stream:
            assert stream.peer == "exec"
            await stream.write(b"hello", timeout=5)
            assert (
                await stream.read_exactly(SIZE + 5, timeout=5)
                == encode(Preamble(Kind.CONTROL, 0, SESSION)) + b"hello"
            )

    asyncio.run(talk())


@pytest.mark.parametrize("way", ["channel", "stream"])
def test_a_command_that_fails_is_quoted_with_its_status(way: str) -> None:
    text = (
        "head -c 32 >/dev/null; echo warming up >&2; printf 'ssh: no route to \\033hostb\\n\\n' >&2; exit 7"
    )

    async def stream() -> None:
        async with await dial_control(ExecDestination(text), None, SESSION, timeout=10) as stream:
            await stream.read_exactly(1, timeout=10)

    def channel() -> None:
        channel = run(text)
        try:
            read(channel, 1)
        finally:
            channel.close()

    with pytest.raises(ChannelClosed) as caught:
        channel() if way == "channel" else asyncio.run(stream())
    assert "ended with status 7, saying: ssh: no route to ?hostb" in str(caught.value)
    assert "ferry accept" in caught.value.remedy


def test_a_command_that_does_not_exist_is_the_shells_complaint() -> None:
    channel = run_after_preamble("no-such-command-here")
    with pytest.raises(ChannelClosed, match=r"no-such-command-here.*not found"):
        read(channel, 1)
    channel.close()


def test_a_command_killed_by_a_signal_is_said_to_be() -> None:
    channel = run_after_preamble("kill -9 $$")
    with pytest.raises(ChannelClosed, match="killed by signal 9"):
        read(channel, 1)
    channel.close()


def test_a_command_that_ends_by_itself_is_not_killed(directory: Path) -> None:
    channel = run(f"cat >/dev/null; echo ended by itself > {directory}/note")
    channel.close()
    assert (directory / "note").read_text() == "ended by itself\n"


def test_closing_ends_a_command_that_ignores_the_end_of_its_input_and_what_it_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command_module, "_PATIENCE", 0.1)
    channel = run("trap '' TERM; sleep 1000 & echo $$; sleep 1000")
    pid = int(read_line(channel))
    assert not session_is_empty(pid)
    channel.close()
    assert gone(lambda: session_is_empty(pid))


def test_what_a_command_leaves_behind_in_its_session_is_ended() -> None:
    channel = run_after_preamble("sleep 1000 & echo $$")
    pid = int(read_line(channel))
    channel.close()
    assert gone(lambda: session_is_empty(pid))


def test_a_process_that_left_the_session_with_stderr_open_does_not_hold_the_close(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_module, "_PATIENCE", 0.1)
    channel = run(f"setsid sh -c 'echo $$ > {directory}/pid; echo up; exec sleep 1000 >/dev/null' & wait")
    assert read_line(channel) == b"up\n"
    began = time.monotonic()
    channel.close()
    assert time.monotonic() - began < 6
    os.kill(int((directory / "pid").read_text()), 9)


def test_abort_kills_the_command_without_patience() -> None:
    channel = run("trap '' TERM; echo $$; sleep 1000")
    pid = int(read_line(channel))
    reading = in_thread(lambda: read(channel, 1))
    began = time.monotonic()
    channel.abort()
    with pytest.raises(ChannelClosed, match="given up by this side"):
        reading.result(20)
    channel.close()
    assert time.monotonic() - began < 2
    assert gone(lambda: session_is_empty(pid))


def test_a_command_that_talks_without_end_on_stderr_is_not_blocked_by_it() -> None:
    channel = run_after_preamble("yes chatter | head -c 1000000 >&2; echo done")
    assert read_line(channel) == b"done\n"
    channel.close()


def test_the_far_end_accepts_on_its_pipes() -> None:
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    channel = accept_page((theirs_in, theirs_out), Preamble(Kind.PAGE, 2, SESSION), None, timeout=5)
    os.write(ours_out, b"page")
    assert read(channel, 4) == b"page"
    channel.send(b"more")
    assert os.read(ours_in, 10) == b"more"
    channel.close()
    assert os.read(ours_in, 1) == b""
    os.close(ours_out)
    os.close(ours_in)


def test_files_in_place_of_pipes_are_refused(directory: Path) -> None:
    one, other = (os.open(directory / "f", os.O_RDWR | os.O_CREAT) for _ in range(2))
    with pytest.raises(UsageError, match="not pipes"):
        accept_page((one, other), Preamble(Kind.PAGE, 2, SESSION), None, timeout=5)
