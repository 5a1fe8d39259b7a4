"""What a server answers about interrupts: what there are, eventfds, masks, and raising one by the client's wish. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from devices.protocols.vfio_user.backend import Backend
from devices.protocols.vfio_user.framing import Message
from devices.protocols.vfio_user.messages import Command, IrqFlags, IrqInfo, IrqSet, SetIrqs, invalid


class Interrupts:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.handlers: Mapping[int, Callable[[Message], bytes]] = {
            Command.DEVICE_GET_IRQ_INFO: self._info,
            Command.DEVICE_SET_IRQS: self._set,
        }

    def release(self) -> None:
        """The client is gone: its eventfds and its masks go with it."""
        for index in range(len(self._backend.irqs)):
            self._disconnect(index)

    def _info(self, message: Message) -> bytes:
        index = IrqInfo.decode(message.payload).index
        self._check(index, 0, 0)
        count = self._backend.irqs[index]
        flags = (IrqFlags.EVENTFD if count else 0) | (
            IrqFlags.MASKABLE if count and index in self._backend.maskable else 0
        )
        return IrqInfo(index, flags, count).encode()

    def _check(self, index: int, start: int, count: int) -> None:
        if index >= len(self._backend.irqs):
            raise invalid(f"there is no interrupt index {index}")
        if start + count > self._backend.irqs[index]:
            raise invalid(
                f"interrupt index {index} has {self._backend.irqs[index]}, and {count} from {start} on are named"
            )

    def _set(self, message: Message) -> bytes:
        """Data: none or a true byte does it to each, an eventfd is what it is signalled by from now on."""
        irqs = IrqSet.decode(message.payload)
        self._check(irqs.index, irqs.start, irqs.count)
        if not irqs.flags & SetIrqs.TRIGGER:
            self._mask(irqs)
        elif irqs.flags & SetIrqs.DATA_EVENTFD:
            # No descriptor with EVENTFD data takes the eventfds away, as in the kernel's -1.
            if len(message.fds) not in (0, irqs.count):
                raise invalid(f"{len(message.fds)} eventfds for {irqs.count} interrupts")
            for number in range(irqs.start, irqs.start + irqs.count):
                self._backend.connect_irq(irqs.index, number, message.take_fd() if message.fds else None)
        elif irqs.count == 0:
            self._disconnect(irqs.index)
        else:
            for number in _named(irqs):
                self._backend.trigger_irq(irqs.index, number)
        return b""

    def _mask(self, irqs: IrqSet) -> None:
        if irqs.index not in self._backend.maskable:
            raise invalid(f"interrupt {irqs.index} cannot be masked")
        if irqs.flags & SetIrqs.DATA_EVENTFD:
            # An eventfd that tells of masking is for a server that masks by itself; none here is AUTOMASKED.
            raise invalid("masks are set and taken by NONE and BOOL, not by an eventfd")
        for number in _named(irqs):
            self._backend.mask_irq(irqs.index, number, bool(irqs.flags & SetIrqs.MASK))

    def _disconnect(self, index: int) -> None:
        for number in range(self._backend.irqs[index]):
            self._backend.connect_irq(index, number, None)
            if index in self._backend.maskable:
                self._backend.mask_irq(index, number, False)


def _named(irqs: IrqSet) -> list[int]:
    """The interrupts that are meant: all of the range, or those with a true byte."""
    return [irqs.start + at for at in range(irqs.count) if irqs.flags & SetIrqs.DATA_NONE or irqs.data[at]]
