"""A coordinator for tests of the daemon alone: it follows the contract and moves nothing.

What `source` does is the command of its `exec:` destination; what `destination` does is what the test writes into the control
connection, one JSON packet a line: each is sent to the daemon, and each answer comes back as a line.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from typing import Any, NoReturn

from migrate.bus import Bus
from migrate.bus.supervisor import SupervisorClient


def say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def outcome(spec: dict[str, Any], word: str, running_on: str, code: int, *reasons: str) -> NoReturn:
    say(
        event="outcome", outcome=word, running_on=running_on, exit_code=code, job=spec["job"],
        machine=spec["machine"], to=spec["to"], rounds=[], downtime_ms=None,
        reasons=[{"device": "uart0", "phase": "load", "reason": reason, "remedy": "mend it"} for reason in reasons],
    )  # fmt: skip
    sys.exit(code)


def wait_for(command: str) -> None:
    while (words := json.loads(sys.stdin.readline())).pop("cmd") != command:
        if words:
            say(event="limits", **words)


def source(spec: dict[str, Any]) -> NoReturn:
    say(event="spec", spec=spec)
    say(event="phase", phase="pre-copy")
    for word in spec["to"].removeprefix("exec:").split("+"):
        if word == "round":
            say(
                event="round",
                n=1,
                pages=2,
                bytes=8192,
                seconds=0.5,
                dirty_rate=100,
                send_rate=16384,
                remaining=4096,
            )
        elif word == "complete":
            outcome(spec, "completed", "destination", 0)
        elif word == "refuse":
            outcome(spec, "refused", "source", 3, "too new", "too large")
        elif word == "doubt":
            outcome(spec, "in_doubt", "neither", 4, "nobody answers")
        elif word == "cancellable":
            say(event="held", at="round:1")
            wait_for("cancel")
            outcome(spec, "aborted", "source", 1, "cancelled by the user")
        elif word == "hold":
            say(event="held", at="round:1")
            wait_for("continue")
        elif word == "garbage":
            print("this is no JSON", flush=True)
            print('["nor is this an object"]', flush=True)
        elif word == "die":
            sys.stdout.write('{"event": "half a line')
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        elif word == "begin":
            asyncio.run(begin(spec, commit=False))
        elif word == "commit":
            asyncio.run(begin(spec, commit=True))
    outcome(spec, "aborted", "source", 1, "nothing more to do")


async def begin(spec: dict[str, Any], *, commit: bool) -> NoReturn:
    """Take the machine as far as a real one would, then die in the middle of it."""
    bus = await Bus.connect(spec["bus"])
    supervisor = SupervisorClient(bus)
    epoch = await supervisor.begin_outgoing(spec["job"], spec["to"])
    await supervisor.peer_is(spec["job"], "peer-incarnation")
    await supervisor.quiesce(spec["job"])
    if commit:
        await supervisor.commit(spec["job"], epoch)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def recover(spec: dict[str, Any]) -> NoReturn:
    say(event="spec", spec=spec)
    wait_for("never")
    sys.exit(1)


def destination(fd: int) -> None:
    host = socket.socket(fileno=fd)
    data, fds, _, _ = socket.recv_fds(host, 1 << 17, 4)
    first = json.loads(data)
    reader, writer = os.fdopen(fds[0], "rb", 0), os.fdopen(os.dup(fds[-1]), "wb", 0)
    writer.write(json.dumps(first).encode() + b"\n")
    for line in reader:
        packet = json.loads(line)
        if packet == "page":
            answer, fds, _, _ = socket.recv_fds(host, 1 << 17, 4)
            for page in fds:
                os.write(page, b"page")
                os.close(page)
        elif packet == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            host.send(json.dumps(packet).encode())
            answer = host.recv(1 << 17) if "want" in packet else b"{}"
        writer.write(answer + b"\n")


if __name__ == "__main__":
    if sys.argv[1] == "destination":
        destination(int(sys.argv[3]))
    elif sys.argv[1] == "source":
        source(json.loads(sys.stdin.readline()))
    else:
        recover(json.loads(sys.stdin.readline()))
