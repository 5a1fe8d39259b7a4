"""What a vhost-user back end answers to one front end, and the state of its rings. No sockets: messages in, replies out.

A ring starts when it has its kick and is enabled, and is served at once, without a kick: what was made available before is there
already. It stops by GET_VRING_BASE, which answers with how far it came. SET_FEATURES and SET_VRING_ADDR come while rings run, when
a migration begins or is given up: they change what is logged, and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, Protocol

from devices.protocols.vhost_user import inflight
from devices.protocols.vhost_user import messages as m
from devices.protocols.vhost_user.inflight import InflightRegion
from devices.protocols.vhost_user.log import DirtyLog
from devices.protocols.vhost_user.memory import MAX_SLOTS, MemoryTable
from devices.protocols.vhost_user.messages import ProtocolFeature, Request
from devices.protocols.vhost_user.transfer import NO_FD_BACK, StateTransfer
from devices.virtio.ring import DriverFault, SplitQueue
from migrate.errors import FerryError

log = logging.getLogger(__name__)

#: Of an answer about the device's state (vhost-user.rst, SET_DEVICE_STATE_FD): bits 0 to 7 are not 0.
_FAILED: Final = 1

#: What every device has; `Backend.own_protocol` is added.
_PROTOCOL: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.DEVICE_STATE
)


class Backend(Protocol):
    """A virtio device. Its methods are called with its lock held; FerryError from one is told to the front end."""

    @property
    def lock(self) -> threading.RLock: ...
    @property
    def table(self) -> MemoryTable: ...
    @property
    def features(self) -> int:
        """Virtio features that are offered, those of the rings among them."""

    @property
    def own_protocol(self) -> ProtocolFeature:
        """CONFIG of what has a configuration that QEMU asks for here, RARP of what can announce an address."""

    @property
    def queues(self) -> list[SplitQueue]: ...
    def config(self) -> bytes: ...
    def negotiated(self, features: int) -> None:
        """Without the bits that are vhost's own."""

    def start_ring(self, ring: int) -> None:
        """Its queue is set up; serve it, from what is there already on."""

    def stop_ring(self, ring: int) -> bool:
        """Serve nothing more of it; what was taken is given back when this returns. False: something lasts, and is not."""

    def notified(self, ring: int) -> None: ...
    def announce(self, mac: bytes) -> None:
        """The guest of this address is here now: the network is to know (SEND_RARP)."""

    def reset(self) -> None: ...
    def save_blob(self) -> bytes:
        """The device's state, while all rings are stopped. :raise FerryError: it has none to give."""

    def check_blob(self, blob: bytes) -> None:
        """Would it load? :raise FerryError: why not."""

    def load_blob(self, blob: bytes) -> None:
        """Take it over; it was checked. :raise FerryError: it could not be."""


class Reply(NamedTuple):
    """A message back; the descriptors are the receiver's to close once they are sent."""

    data: bytes
    fds: tuple[int, ...] = ()


class Ring:
    """What the front end says of one ring, beside its queue. Owns its descriptors."""

    def __init__(self) -> None:
        self.kick = self.call = self.err = -1
        self.enabled = self.started = False
        self.hangs = False  #: it was to stop and did not

    def set(self, name: str, fd: int) -> None:
        """:param fd: owned from here on; -1 for none."""
        before = getattr(self, name)
        setattr(self, name, fd)
        if before >= 0:
            os.close(before)

    def close(self) -> None:
        for name in ("kick", "call", "err"):
            self.set(name, -1)


class Session:
    """One front end, from its connection to its end."""

    def __init__(self, backend: Backend, watch: Callable[[int, int], None] = lambda ring, fd: None) -> None:
        """:param watch: told a ring and its kick's descriptor, -1 for none any more."""
        self._backend = backend
        self._watch = watch
        self._protocol = ProtocolFeature(0)
        self.features = 0
        self.rings = [Ring() for _ in backend.queues]
        self._inflight: InflightRegion | None = None
        self._transfer: StateTransfer | None = None
        self._given: list[int] = []  # descriptors of the answer that is being made

    def handle(self, header: m.Header, payload: memoryview, fds: list[int]) -> Reply | None:
        """The reply, or None where there is none. Takes the descriptors that it wants out of `fds`.

        :raise BadRequest: the connection cannot go on.
        """
        handler = _HANDLERS.get(header.request)
        with self._backend.lock:
            try:
                if handler is None:
                    raise m.refused(f"request {header.request} is not known here")
                answer = handler(self, payload, fds)
            except m.BadRequest as error:
                if not self._acknowledges(header):
                    raise
                log.warning("event=refused request=%d reason=%r", header.request, error.reason)
                return Reply(m.reply(header.request, m.pack_u64(1)))
        given, self._given = tuple(self._given), []
        if answer is not None:
            return Reply(m.reply(header.request, answer), given)
        return Reply(m.reply(header.request, m.pack_u64(0))) if self._acknowledges(header) else None

    def _acknowledges(self, header: m.Header) -> bool:
        return header.wants_reply and bool(self._protocol & ProtocolFeature.REPLY_ACK)

    def interrupt(self, ring: int) -> None:
        """The driver wants to know. From any thread; nothing where nobody listens."""
        fd = self.rings[ring].call
        if fd >= 0:
            os.eventfd_write(fd, 1)

    def broken(self, ring: int) -> None:
        fd = self.rings[ring].err
        if fd >= 0:
            os.eventfd_write(fd, 1)

    def close(self) -> None:
        """The front end is gone: nothing is served, and nothing of its is kept."""
        with self._backend.lock:
            for number, ring in enumerate(self.rings):
                with contextlib.suppress(m.BadRequest):  # nobody is there to be told
                    self._stop(number)
                ring.close()
            self._backend.table.logging = False
            self._backend.table.set_log(None)
            self._backend.table.clear()
            self._set_inflight(None)
        if self._transfer is not None:
            self._transfer.close()

    # -- features --------------------------------------------------------------------------------------------------------------

    def _get_features(self, payload: memoryview, fds: list[int]) -> bytes:
        return m.pack_u64(self._backend.features | m.F_LOG_ALL | m.F_PROTOCOL_FEATURES)

    def _set_features(self, payload: memoryview, fds: list[int]) -> None:
        wanted = m.u64(payload)
        if strange := wanted & ~(self._backend.features | m.F_LOG_ALL | m.F_PROTOCOL_FEATURES):
            raise m.refused(f"the features {strange:#x} were not offered")
        self._backend.table.logging = bool(wanted & m.F_LOG_ALL)
        given = wanted & ~(m.F_LOG_ALL | m.F_PROTOCOL_FEATURES)
        if given != self.features & ~(m.F_LOG_ALL | m.F_PROTOCOL_FEATURES) or not self.features:
            self._backend.negotiated(given)
        self.features = wanted

    def _get_protocol_features(self, payload: memoryview, fds: list[int]) -> bytes:
        return m.pack_u64(_PROTOCOL | self._backend.own_protocol)

    def _set_protocol_features(self, payload: memoryview, fds: list[int]) -> None:
        wanted = m.u64(payload)
        if strange := wanted & ~int(_PROTOCOL | self._backend.own_protocol):
            raise m.refused(f"the protocol features {strange:#x} were not offered")
        self._protocol = ProtocolFeature(wanted)

    def _owner(self, payload: memoryview, fds: list[int]) -> None:
        """There is one front end a connection; it owns the device by being there."""

    def _get_queue_num(self, payload: memoryview, fds: list[int]) -> bytes:
        return m.pack_u64(len(self.rings))

    def _get_config(self, payload: memoryview, fds: list[int]) -> bytes:
        offset, size, _ = m.config(payload)
        whole = self._backend.config().ljust(m.MAX_CONFIG, b"\0")
        return m.pack_config(offset, whole[offset : offset + size].ljust(size, b"\0"))

    def _set_config(self, payload: memoryview, fds: list[int]) -> None:
        m.config(payload)
        raise m.refused("no driver may change this device's configuration")

    def _send_rarp(self, payload: memoryview, fds: list[int]) -> None:
        if not self._protocol & ProtocolFeature.RARP:
            raise m.refused("an address is to be announced, which was not agreed on")
        self._backend.announce(m.mac(payload))

    def _reset_device(self, payload: memoryview, fds: list[int]) -> None:
        for number in range(len(self.rings)):
            self._stop(number)
        self._backend.reset()

    # -- memory ----------------------------------------------------------------------------------------------------------------

    def _set_mem_table(self, payload: memoryview, fds: list[int]) -> None:
        entries = m.table(payload)
        if len(fds) != len(entries):
            raise m.refused(f"{len(fds)} descriptors came with a table of {len(entries)} regions")
        self._backend.table.replace(entries, fds)

    def _get_max_mem_slots(self, payload: memoryview, fds: list[int]) -> bytes:
        return m.pack_u64(MAX_SLOTS)

    def _add_mem_reg(self, payload: memoryview, fds: list[int]) -> None:
        if len(fds) != 1:
            raise m.refused(f"{len(fds)} descriptors came with one region of memory")
        self._backend.table.add(m.region(payload), fds[0])

    def _rem_mem_reg(self, payload: memoryview, fds: list[int]) -> None:
        self._backend.table.remove(m.region(payload))

    def _set_log_base(self, payload: memoryview, fds: list[int]) -> bytes:
        size, offset = m.log_base(payload)
        if len(fds) != 1:
            raise m.refused(f"{len(fds)} descriptors came with the dirty log")
        self._backend.table.set_log(DirtyLog(fds[0], size, offset))
        return m.pack_u64(0)

    def _set_log_fd(self, payload: memoryview, fds: list[int]) -> None:
        """An eventfd that would say that something was logged: QEMU looks by itself."""

    # -- requests in flight, and the device's own state --------------------------------------------------------------------------

    def _get_inflight_fd(self, payload: memoryview, fds: list[int]) -> bytes:
        wanted = m.inflight(payload)
        fd, size = inflight.make(wanted.queues, wanted.entries)
        self._given.append(fd)
        return m.pack_inflight(m.Inflight(size, 0, wanted.queues, wanted.entries))

    def _set_inflight_fd(self, payload: memoryview, fds: list[int]) -> None:
        given = m.inflight(payload)
        if len(fds) != 1:
            raise m.refused(f"{len(fds)} descriptors came with the in-flight region")
        if any(ring.started for ring in self.rings):
            raise m.refused("the in-flight region is changed while rings run")
        self._set_inflight(InflightRegion(fds[0], given.size, given.offset, given.queues, given.entries))

    def _set_inflight(self, region: InflightRegion | None) -> None:
        for number, queue in enumerate(self._backend.queues):
            queue.journal = (
                region.queues[number] if region is not None and number < len(region.queues) else None
            )
        before, self._inflight = self._inflight, region
        if before is not None:
            before.close()

    def _recover(self, number: int) -> None:
        """What another process had in flight when it was killed is carried out again, before anything new."""
        queue = self._backend.queues[number]
        if self._inflight is None or number >= len(self._inflight.queues):
            return
        try:
            used = queue.used_index()
        except DriverFault as error:
            raise m.refused(error.reason) from error
        if self._inflight.queues[number].entries < queue.size:
            raise m.refused(
                f"the in-flight region has {self._inflight.queues[number].entries} entries for a ring of {queue.size}"
            )
        heads = self._inflight.queues[number].recover(used)
        if heads:
            log.warning("event=requests-again ring=%d used=%d heads=%s", number, used, heads)
            queue.resume(used, [head for head in heads if head < queue.size])

    def _set_device_state_fd(self, payload: memoryview, fds: list[int]) -> bytes:
        """Answers that our end of the pipe is theirs to use: bit 8, no descriptor comes back. A failure is an answer too."""
        direction = m.device_state(payload)
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            transfer.close()
        try:
            if len(fds) != 1:
                raise m.refused(f"{len(fds)} descriptors came for the device's state")
            self._require_stopped()
            blob = self._backend.save_blob() if direction == m.SAVE else b""
        except FerryError as error:
            log.error("event=device-state-refused reason=%r", error.reason)
            return m.pack_u64(_FAILED | NO_FD_BACK)
        self._transfer = StateTransfer(fds.pop(), direction, blob)
        return m.pack_u64(NO_FD_BACK)

    def _require_stopped(self) -> None:
        if any(ring.started for ring in self.rings):
            raise m.refused("a ring runs, and the device's state with it")

    def _check_device_state(self, payload: memoryview, fds: list[int]) -> bytes:
        transfer, self._transfer = self._transfer, None
        try:
            if transfer is None:
                raise m.refused("no device state was transferred")
            loaded = transfer.end()
            if loaded is not None:
                self._require_stopped()
                self._backend.check_blob(loaded)
                self._backend.load_blob(loaded)
        except FerryError as error:
            log.error("event=device-state-refused reason=%r", error.reason)
            return m.pack_u64(_FAILED)
        return m.pack_u64(0)

    # -- rings -----------------------------------------------------------------------------------------------------------------

    def _ring(self, number: int) -> tuple[Ring, SplitQueue]:
        if number >= len(self.rings):
            raise m.refused(f"there is no ring {number}; there are {len(self.rings)}")
        return self.rings[number], self._backend.queues[number]

    def _set_vring_num(self, payload: memoryview, fds: list[int]) -> None:
        number, size = m.state(payload)
        ring, queue = self._ring(number)
        if ring.started or not 0 < size <= queue.max_size or size.bit_count() != 1:
            raise m.refused(
                f"ring {number} cannot have {size} entries now; up to {queue.max_size}, by powers of two"
            )
        queue.size = size

    def _set_vring_addr(self, payload: memoryview, fds: list[int]) -> None:
        given = m.addresses(payload)
        ring, queue = self._ring(given.ring)
        found = [
            self._backend.table.guest_address(user)
            for user in (given.descriptors, given.available, given.used)
        ]
        if ring.started and found != [queue.descriptors, queue.available, queue.used]:
            raise m.refused(f"ring {given.ring} is moved while it runs")
        queue.descriptors, queue.available, queue.used = found

    def _set_vring_base(self, payload: memoryview, fds: list[int]) -> None:
        number, base = m.state(payload)
        ring, queue = self._ring(number)
        if ring.started or base > 0xFFFF:
            raise m.refused(f"ring {number} cannot begin with {base} now")
        queue.begin_at(base)

    def _get_vring_base(self, payload: memoryview, fds: list[int]) -> bytes:
        number, _ = m.state(payload)
        ring, queue = self._ring(number)
        self._stop(number)
        self._watch(number, -1)
        ring.set("kick", -1)
        return m.pack_state(number, queue.taken)

    def _set_vring_kick(self, payload: memoryview, fds: list[int]) -> None:
        number = self._take(payload, fds, "kick")
        self._watch(number, self.rings[number].kick)
        if not self.features & m.F_PROTOCOL_FEATURES:
            self.rings[number].enabled = True
        self._start(number)

    def _set_vring_call(self, payload: memoryview, fds: list[int]) -> None:
        self._take(payload, fds, "call")

    def _set_vring_err(self, payload: memoryview, fds: list[int]) -> None:
        self._take(payload, fds, "err")

    def _take(self, payload: memoryview, fds: list[int], name: str) -> int:
        number, comes = m.ring_and_fd(payload)
        ring, _ = self._ring(number)
        if len(fds) != int(comes):
            raise m.refused(f"{len(fds)} descriptors came for the {name} of ring {number}")
        ring.set(name, fds.pop() if comes else -1)
        return number

    def _set_vring_enable(self, payload: memoryview, fds: list[int]) -> None:
        number, value = m.state(payload)
        ring, _ = self._ring(number)
        ring.enabled = value == 1
        if ring.enabled:
            self._start(number)
        else:
            self._stop(number)

    def _start(self, number: int) -> None:
        ring, queue = self._ring(number)
        if ring.started or not ring.enabled or ring.kick < 0 or not queue.used:
            return
        self._recover(number)
        queue.enabled = ring.started = True
        self._backend.start_ring(number)
        log.info("event=ring-started ring=%d base=%d size=%d", number, queue.taken, queue.size)

    def _stop(self, number: int) -> None:
        ring, queue = self._ring(number)
        if ring.started:
            ring.hangs = ring.hangs or not self._backend.stop_ring(number)
            if ring.hangs:
                # No base can be said that is true: before it the guest would wait for ever, behind it somebody else would do it
                # again while it may yet be done here. Without an answer QEMU counts from the used ring, and knows of a failure.
                raise m.refused(f"ring {number} does not stop: a request of it lasts")
            ring.started = False
            log.info("event=ring-stopped ring=%d base=%d", number, queue.taken)


_HANDLERS: Final[Mapping[int, Callable[[Session, memoryview, list[int]], bytes | None]]] = {
    Request.GET_FEATURES: Session._get_features,
    Request.SET_FEATURES: Session._set_features,
    Request.SET_OWNER: Session._owner,
    Request.RESET_OWNER: Session._owner,
    Request.SET_MEM_TABLE: Session._set_mem_table,
    Request.SET_LOG_BASE: Session._set_log_base,
    Request.SET_LOG_FD: Session._set_log_fd,
    Request.SET_VRING_NUM: Session._set_vring_num,
    Request.SET_VRING_ADDR: Session._set_vring_addr,
    Request.SET_VRING_BASE: Session._set_vring_base,
    Request.GET_VRING_BASE: Session._get_vring_base,
    Request.SET_VRING_KICK: Session._set_vring_kick,
    Request.SET_VRING_CALL: Session._set_vring_call,
    Request.SET_VRING_ERR: Session._set_vring_err,
    Request.GET_PROTOCOL_FEATURES: Session._get_protocol_features,
    Request.SET_PROTOCOL_FEATURES: Session._set_protocol_features,
    Request.GET_QUEUE_NUM: Session._get_queue_num,
    Request.SET_VRING_ENABLE: Session._set_vring_enable,
    Request.SEND_RARP: Session._send_rarp,
    Request.GET_CONFIG: Session._get_config,
    Request.SET_CONFIG: Session._set_config,
    Request.GET_INFLIGHT_FD: Session._get_inflight_fd,
    Request.SET_INFLIGHT_FD: Session._set_inflight_fd,
    Request.RESET_DEVICE: Session._reset_device,
    Request.GET_MAX_MEM_SLOTS: Session._get_max_mem_slots,
    Request.ADD_MEM_REG: Session._add_mem_reg,
    Request.REM_MEM_REG: Session._rem_mem_reg,
    Request.SET_DEVICE_STATE_FD: Session._set_device_state_fd,
    Request.CHECK_DEVICE_STATE: Session._check_device_state,
}
