"""A QEMU that arrives: it waits with `-incoming defer -S`, and is fed from the page channels. The counterpart of qemu_out.py."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from migrate.coordinator.link import Link
from migrate.coordinator.pages_in import PageSink
from migrate.coordinator.participants import Participants
from migrate.errors import FerryError, Phase, Reason, RemoteProtocolError
from migrate.memory import GuestMemory, PageRuns
from migrate.protocol import frames
from migrate.protocol import messages as m
from migrate.qemu import facts as compared
from migrate.qemu.facts import Facts
from migrate.qemu.monitor import Qemu
from migrate.qemu.relay import Channel, RelayIn

log = logging.getLogger(__name__)

#: How long QEMU may take to load what the source has sent whole, s.
LOAD_SECONDS = 60.0
#: What goes back is a few bytes; a control channel that takes none of it for this long is broken, s.
BACK_SECONDS = 15.0


async def compare(parts: Participants, manifest: m.Manifest) -> tuple[Facts, list[Reason]]:
    """Every difference between the source's QEMU and the one that waits here."""
    assert parts.qemu is not None
    here = await Qemu(parts.qemu).facts()
    source = next(entry.options for entry in manifest.devices if entry.id == parts.qemu.device)
    return here, compared.differences(source, here, parts.qemu.device)


class QemuReceiver:
    """Has the interface of PageReceiver, for whoever joins channels and waits for the end of what comes."""

    def __init__(
        self, parts: Participants, link: Link, memory: GuestMemory, on_refusal: Callable[[FerryError], None]
    ) -> None:
        assert parts.qemu is not None
        self._qemu = Qemu(parts.qemu)
        self._link = link
        self._loop = loop = asyncio.get_running_loop()
        self._directory = Path(tempfile.mkdtemp(prefix="ferry-"))

        def failed(error: FerryError) -> None:
            error.device = error.device or self._qemu.client.device
            loop.call_soon_threadsafe(on_refusal, error)

        self._relay = RelayIn(failed, self._back)
        self._stopping = threading.Event()
        self._prefaulting = threading.Thread(
            target=self._prefault, args=(memory,), name="prefault", daemon=True
        )
        self._prefaulting.start()

    def _prefault(self, memory: GuestMemory) -> None:
        """Have the guest's memory allocated ahead of QEMU, which allocates all of it anyway: it reads what it is told is zero.
        Left to QEMU that goes on after the source has stopped: half a second for 256 MiB was seen."""
        try:
            if memory.page_count:
                memory.prefault(PageRuns([(0, memory.page_count)]), self._stopping.is_set)
        except FerryError as error:
            log.warning("event=prefault error=%s", error)  # QEMU says so itself, if it comes to that

    def _back(self, frame: bytes) -> None:
        """From the relay's thread."""
        writing = asyncio.run_coroutine_threadsafe(self._link.write(frame), self._loop)
        try:
            writing.result(BACK_SECONDS)
        except FerryError:
            pass  # the link is broken, which is told by the link itself

    async def listen(self, facts: Facts, connections: int) -> None:
        """Have QEMU listen for as many connections as the source's QEMU will make."""
        path = self._directory / "in.sock"
        await self._qemu.incoming(facts, path, max(connections - 1, 0))
        self._relay.listen(path, max(connections, 1))

    def join(self, index: int, channel: Channel) -> None:
        self._relay.join(index, channel)

    def join_inline(self) -> PageSink:
        async def take(header: frames.Header, body: bytes) -> None:
            await asyncio.to_thread(self._relay.take, header, body)

        return take

    async def round_ended(self, _number: int) -> tuple[bytes, ...]:
        found = await asyncio.to_thread(self._relay.digests, LOAD_SECONDS)
        if found is None:
            raise RemoteProtocolError(
                "the source says that all is sent, and a connection of its QEMU has not ended",
                phase=Phase.LOAD,
            )
        return found

    async def close(self) -> None:
        self._stopping.set()
        await asyncio.to_thread(self._relay.close)
        await asyncio.to_thread(self._prefaulting.join)
        shutil.rmtree(self._directory, ignore_errors=True)
