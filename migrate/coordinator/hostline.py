"""The line from a destination's coordinator to the daemon that started it: JSON packets with descriptors, one request at a time."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from migrate.errors import BusError, ChannelClosed, FerryError, Phase, Reason, UsageError
from migrate.machine import hostconfig
from migrate.transport import preamble
from migrate.transport.descriptors import receive_fds

MAX_PACKET = 256 << 10
MAX_DESCRIPTORS = 4
#: Starting a machine's participants takes seconds; see migrate.machine.launcher.
ANSWER_SECONDS = 90.0


class HostLine:
    """Our end of a SOCK_SEQPACKET pair."""

    def __init__(self, fd: int, on_command: Callable[[str], None]) -> None:
        """:param on_command: told of `continue`."""
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        self._on_command = on_command
        self._spec: asyncio.Future[tuple[dict[str, Any], list[int]]] = (
            asyncio.get_running_loop().create_future()
        )
        self._answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._pages: asyncio.Queue[tuple[int, list[int]]] = asyncio.Queue()
        self._asking = asyncio.Lock()
        self._host: hostconfig.HostConfig | None = None
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._readable)

    def _readable(self) -> None:
        try:
            data, descriptors, _ = receive_fds(self._socket, MAX_PACKET, MAX_DESCRIPTORS)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        if not data:  # the daemon has gone; what goes on needs it no more, what would need it is told
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._answers.put_nowait(
                {"error": Reason(None, "setup", "the host's daemon has gone", "").to_wire()}
            )
            return
        packet = json.loads(data)
        if "spec" in packet:
            session = preamble.decode(bytes.fromhex(packet["preamble"])).session.hex()
            self._spec.set_result(({**packet["spec"], "session": session}, list(descriptors)))
        elif "page" in packet:
            self._pages.put_nowait((int(packet["page"]), list(descriptors)))
        elif "cmd" in packet:
            self._on_command(packet["cmd"])
        else:
            self._answers.put_nowait(packet)

    async def spec(self) -> tuple[dict[str, Any], list[int]]:
        """What to do, and the descriptors of the control connection: a socket, or two pipes."""
        spec, descriptors = await asyncio.wait_for(self._spec, 10.0)
        self._host = hostconfig.load(Path(spec["host"]))
        return spec, descriptors

    def emit(self, event: dict[str, Any]) -> None:
        self._send({"event": event})

    def _send(self, packet: dict[str, Any]) -> None:
        try:
            self._socket.send(json.dumps(packet).encode())
        except OSError:
            pass  # the daemon is gone or slow; events are for people, the ledger is what counts

    async def _want(self, packet: dict[str, Any]) -> dict[str, Any]:
        async with self._asking:
            self._send(packet)
            try:
                answer = await asyncio.wait_for(self._answers.get(), ANSWER_SECONDS)
            except TimeoutError:
                raise ChannelClosed(
                    f"this host's daemon did not answer within {ANSWER_SECONDS:.0f} s",
                    phase=Phase.PREFLIGHT,
                    remedy="see its log",
                ) from None
        if "error" in answer:
            reason = Reason.from_wire(answer["error"])
            raise BusError(reason.reason, remedy=reason.remedy, phase=reason.phase, device=reason.device)
        return answer

    # -- what the coordinator needs (destination.Host) ---------------------------------------------------------------------

    @property
    def config(self) -> hostconfig.HostConfig:
        assert self._host is not None
        return self._host

    def offers(self, type_name: str) -> Reason | None:
        """None, or why this host cannot run a device of this type."""
        try:
            self.config.command_of(type_name)
        except UsageError as error:
            return error.as_reason()
        return None

    def free_bytes(self) -> int:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
        raise FerryError("/proc/meminfo does not say how much memory is free", phase=Phase.PREFLIGHT)

    async def incoming(self, machine: dict[str, Any], job: str, peer: str) -> str:
        answer = await self._want({"want": "incoming", "machine": machine, "job": job, "peer": peer})
        return str(answer["bus"])

    async def ask(self, machine: str, job: str, epoch: int) -> str:
        answer = await self._want({"want": "ask", "machine": machine, "job": job, "epoch": epoch})
        return str(answer["answer"])

    async def next_page(self) -> tuple[int, list[int]]:
        return await self._pages.get()
