"""uart16550: a serial port after National's PC16550D data sheet, with a file, FIFO or terminal behind it.

Registers are in docs/devices.md, state in schemas/uart16550.toml. The line is as fast as its back end: a byte written to
THR is appended to `output` within that write. What the back end does not take stays in the transmit FIFO, and so does
what arrives while the device is not RUNNING: bytes in the FIFOs are state and move with the machine. Not modelled: parity,
framing and break errors (a file has none), DMA mode, and the one byte that a chip keeps in its shift register.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Mapping
from typing import Any, ClassVar

from devices.kit import Device, PciIdentity, RegionInfo, main
from devices.kit.timers import Timer
from migrate.errors import DeviceRefused, Phase, UsageError

log = logging.getLogger(__name__)


class Register:
    """Offsets. DATA is RBR when read and THR when written; DATA and IER are the divisor while LCR bit 7 is set."""

    DATA, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)


IER_RECEIVED, IER_THR_EMPTY, IER_LINE_ERROR, IER_MODEM = 0x01, 0x02, 0x04, 0x08
IIR_NONE, IIR_MODEM, IIR_THR_EMPTY, IIR_RECEIVED = 0x01, 0x00, 0x02, 0x04
IIR_LINE_ERROR, IIR_TIMEOUT = 0x06, 0x0C
IIR_FIFOS_ON = 0xC0
FCR_FIFOS_ON, FCR_CLEAR_RX, FCR_CLEAR_TX, FCR_KEPT = 0x01, 0x02, 0x04, 0xC9
LCR_DLAB = 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP, MCR_KEPT = 0x01, 0x02, 0x04, 0x08, 0x10, 0x1F
LSR_DATA_READY, LSR_OVERRUN, LSR_TRANSMITTER_EMPTY = 0x01, 0x02, 0x60
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD, MSR_CHANGES = 0x10, 0x20, 0x40, 0x80, 0x0F

FIFO_DEPTH = 16
TRIGGERS = (1, 4, 8, 14)  # by FCR bits 7-6
BAUD_BASE = 115200  # bits a second at divisor 1: a clock of 1.8432 MHz, 16 of its ticks a bit
RETRY_SECONDS = 0.01  # how long a back end that takes nothing, or gives nothing, is left alone


class Uart16550(Device):
    type = "uart16550"
    regions = (RegionInfo(8, name="registers"),)
    #: QEMU's pci-serial (QEMU, docs/specs/pci-ids): a 16550 behind eight ports, which drivers of that know.
    identity = PciIdentity(0x1B36, 0x0002, 0x070002, ports=True)
    options: ClassVar[Mapping[str, str]] = {
        "output": "file, FIFO or terminal that sent bytes are appended to; thrown away without it",
        "input": "FIFO or terminal that received bytes come from",
    }

    def setup(self, options: Mapping[str, str]) -> None:
        self._running = False
        self._output = _open_output(options["output"]) if "output" in options else None
        self._output_failed = False
        self._input = _open_input(options["input"]) if "input" in options else None
        if self._input is not None:
            self.every(RETRY_SECONDS, self._receive)
        self._retry: Timer | None = None
        self._silence: Timer | None = None
        self._silent_from = 0.0
        self.dll, self.dlm, self.scr = 12, 0, 0  # these survive a reset, as on the chip; 9600 baud

    def reset(self) -> None:
        self.ier = self.fcr = self.lcr = self.mcr = 0
        self.overrun = False
        self.msr = _modem_lines(self.mcr)
        self.rx = bytearray()
        self.tx = bytearray()
        self.thr_empty_pending = False
        self.timeout_pending = False
        self.interrupting = False  #: the level of the chip's INTR pin; each rise is one edge to the VMM

    def close(self) -> None:
        for fd in (self._output, self._input):
            if fd is not None:
                os.close(fd)
        self._output = self._input = None

    # -- registers ------------------------------------------------------------------------------------------------------

    def read(self, region: int, offset: int, size: int) -> int:
        if size != 1:
            return 0
        value = self._read_register(offset)
        self._update_interrupt()
        return value

    def _read_register(self, offset: int) -> int:
        dlab = self.lcr & LCR_DLAB
        match offset:
            case Register.DATA:
                return self.dll if dlab else self._read_rbr()
            case Register.IER:
                return self.dlm if dlab else self.ier
            case Register.IIR_FCR:
                cause = self._cause()
                if cause == IIR_THR_EMPTY:
                    self.thr_empty_pending = False
                return cause | (IIR_FIFOS_ON if self._fifos_on else 0)
            case Register.LCR:
                return self.lcr
            case Register.MCR:
                return self.mcr
            case Register.LSR:
                value = self._line_status()
                self.overrun = False
                return value
            case Register.MSR:
                value = self.msr
                self.msr &= ~MSR_CHANGES
                return value
            case Register.SCR:
                return self.scr
        return 0

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        if size != 1:
            return
        dlab = self.lcr & LCR_DLAB
        match offset:
            case Register.DATA if dlab:
                self.dll = value
            case Register.DATA:
                self._write_thr(value)
            case Register.IER if dlab:
                self.dlm = value
            case Register.IER:
                # Enabling this interrupt while THR is empty raises it at once; drivers probe for that.
                if value & ~self.ier & IER_THR_EMPTY and not self.tx:
                    self.thr_empty_pending = True
                self.ier = value & 0x0F
            case Register.IIR_FCR:
                self._write_fcr(value)
            case Register.LCR:
                self.lcr = value
            case Register.MCR:
                self.mcr = value & MCR_KEPT
                self._move_modem_lines()
            case Register.SCR:
                self.scr = value
        self._update_interrupt()

    def _read_rbr(self) -> int:
        if not self.rx:
            return 0
        value = self.rx.pop(0)
        self.timeout_pending = False
        self._watch_for_silence()
        if not self.rx:
            self._update_interrupt()  # low, before what waits in the back end may raise it again
            self._receive()
        return value

    def _write_thr(self, value: int) -> None:
        if len(self.tx) < self._depth:
            self.tx.append(value)
        elif not self._fifos_on:
            self.tx[0] = value  # a 16450 overwrites what it holds; a full FIFO drops the newcomer
        self.thr_empty_pending = False
        self._update_interrupt()  # low, before the byte is out and raises it again
        self._transmit()

    def _write_fcr(self, value: int) -> None:
        if not value & FCR_FIFOS_ON:
            value = 0
        toggled = (value ^ self.fcr) & FCR_FIFOS_ON
        self.fcr = value & FCR_KEPT
        if toggled or value & FCR_CLEAR_RX:
            self.rx.clear()
            self.timeout_pending = False
        if (toggled or value & FCR_CLEAR_TX) and self.tx:
            self.tx.clear()
            self.thr_empty_pending = True

    @property
    def _fifos_on(self) -> bool:
        return bool(self.fcr & FCR_FIFOS_ON)

    @property
    def _depth(self) -> int:
        return FIFO_DEPTH if self._fifos_on else 1

    @property
    def _trigger(self) -> int:
        return TRIGGERS[self.fcr >> 6]

    # -- interrupts -----------------------------------------------------------------------------------------------------

    def _line_status(self) -> int:
        return (
            (LSR_DATA_READY if self.rx else 0)
            | (LSR_OVERRUN if self.overrun else 0)
            | (0 if self.tx else LSR_TRANSMITTER_EMPTY)
        )

    def _cause(self) -> int:
        """What IIR names: of the causes that are enabled, the one of highest priority."""
        causes = (
            (IER_LINE_ERROR, self.overrun, IIR_LINE_ERROR),
            (IER_RECEIVED, len(self.rx) >= self._trigger, IIR_RECEIVED),
            (IER_RECEIVED, self.timeout_pending, IIR_TIMEOUT),
            (IER_THR_EMPTY, self.thr_empty_pending, IIR_THR_EMPTY),
            (IER_MODEM, self.msr & MSR_CHANGES, IIR_MODEM),
        )
        return next((name for enable, pending, name in causes if self.ier & enable and pending), IIR_NONE)

    def _update_interrupt(self) -> None:
        interrupting = self._cause() != IIR_NONE
        if interrupting and not self.interrupting:
            self.irq().raise_()
        self.interrupting = interrupting

    def _move_modem_lines(self) -> None:
        lines = _modem_lines(self.mcr)
        changes = (lines ^ self.msr) >> 4
        if lines & MSR_RI:
            changes &= ~(MSR_RI >> 4)  # of RI only the fall counts
        self.msr = lines | self.msr & MSR_CHANGES | changes & MSR_CHANGES

    # -- the line -------------------------------------------------------------------------------------------------------

    def _transmit(self) -> None:
        """Move the transmit FIFO to where the line leads. Not before RUNNING: until then the bytes are state."""
        if not self._running or not self.tx:
            return
        if self.mcr & MCR_LOOP:
            for value in self.tx:
                self._arrive(value)
            self.tx.clear()
        else:
            del self.tx[: self._send(self.tx)]
        if not self.tx:
            self.thr_empty_pending = True
        elif self._retry is None:
            self._retry = self.every(RETRY_SECONDS, self._retry_transmit)

    def _retry_transmit(self) -> None:
        self._transmit()
        self._update_interrupt()
        if not self.tx and self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def _send(self, data: bytearray) -> int:
        """How many bytes the back end took; 0 if it cannot take any now."""
        if self._output is None:
            return len(data)
        try:
            count = os.write(self._output, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            if not self._output_failed:
                log.warning(
                    "event=output-failed reason=%r; sent bytes are kept and tried again", error.strerror
                )
            self._output_failed = True
            return 0
        self._output_failed = False
        return count

    def _receive(self) -> None:
        """Take from the input what there is room for: the rest waits where it is, so nothing is ever overrun."""
        if not self._running or self._input is None or self.mcr & MCR_LOOP or len(self.rx) >= self._depth:
            return
        try:
            data = os.read(self._input, self._depth - len(self.rx))
        except OSError:
            return  # nothing there, or a terminal that hung up and may come back
        for value in data:
            self._arrive(value)
        self._update_interrupt()

    def _arrive(self, value: int) -> None:
        """A byte came in on the line."""
        if len(self.rx) < self._depth:
            self.rx.append(value)
        else:
            self.overrun = True
            if not self._fifos_on:
                self.rx[0] = value  # a 16450 keeps the newest, a FIFO the oldest
        self.timeout_pending = False
        self._watch_for_silence()

    # -- the character timeout ------------------------------------------------------------------------------------------

    def _watch_for_silence(self) -> None:
        """A byte came or was read: the four character times begin again."""
        self._silent_from = time.monotonic()
        if self._silence is None and self.rx and self._fifos_on:
            self._silence = self.every(self._four_characters(), self._check_silence)

    def _four_characters(self) -> float:
        """Seconds that four characters take at the divisor and format set; a divisor of 0 counts as 1."""
        bits = 1 + 5 + (self.lcr & 3) + (1 if self.lcr & 0x08 else 0) + (2 if self.lcr & 0x04 else 1)
        return 4 * bits * max(1, self.dlm << 8 | self.dll) / BAUD_BASE

    def _check_silence(self) -> None:
        if self.rx and self._fifos_on and time.monotonic() - self._silent_from < self._four_characters():
            return
        if self.rx and self._fifos_on:
            self.timeout_pending = True
            self._update_interrupt()
        self._stop_watching()

    def _stop_watching(self) -> None:
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None

    # -- running and resting --------------------------------------------------------------------------------------------

    def leave_p2p(self) -> None:
        self._running = True
        self._transmit()
        self._receive()
        if not self.timeout_pending:
            self._watch_for_silence()
        self._update_interrupt()

    def enter_p2p(self) -> None:
        self._running = False

    # -- state ----------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        return {
            "ier": self.ier,
            "iir_thre_pending": self.thr_empty_pending,
            "fcr": self.fcr,
            "lcr": self.lcr,
            "mcr": self.mcr,
            "lsr_errors": LSR_OVERRUN if self.overrun else 0,
            "msr": self.msr,
            "scr": self.scr,
            "divisor": self.dlm << 8 | self.dll,
            "rx_fifo": bytes(self.rx),
            "tx_fifo": bytes(self.tx),
            "rx_trigger": self._trigger,
            "rx_timeout_pending": self.timeout_pending,
            # An edge that no VMM heard of here is raised again where the machine runs next.
            "irq_raised": self.interrupting and not self.irq().raised,
        }

    def check(self, state: Mapping[str, Any]) -> None:
        fifos_on = state["fcr"] & FCR_FIFOS_ON
        depth = FIFO_DEPTH if fifos_on else 1
        impossible = {
            "ier has a reserved bit": state["ier"] & ~0x0F,
            "fcr has a bit that is never kept": state["fcr"] & ~FCR_KEPT or (state["fcr"] and not fifos_on),
            "mcr has a reserved bit": state["mcr"] & ~MCR_KEPT,
            "msr has other lines than mcr gives": (state["msr"] & ~MSR_CHANGES) != _modem_lines(state["mcr"]),
            "lsr_errors has an error that this line cannot have": state["lsr_errors"] & ~LSR_OVERRUN,
            "rx_fifo is longer than the FIFO": len(state["rx_fifo"]) > depth,
            "tx_fifo is longer than the FIFO": len(state["tx_fifo"]) > depth,
            # 1 is also the default, which stands here for a state of version 1: that had fcr alone.
            "rx_trigger contradicts fcr": state["rx_trigger"] not in (1, TRIGGERS[state["fcr"] >> 6]),
            "rx_timeout_pending without bytes in a FIFO": state["rx_timeout_pending"]
            and not (fifos_on and state["rx_fifo"]),
        }
        if wrong := [what for what, found in impossible.items() if found]:
            raise DeviceRefused(
                f"no uart16550 can be in the state sent: {'; '.join(wrong)}",
                remedy="the sender is not this device or is broken; its state was not taken over",
                phase=Phase.LOAD,
                device=self.id,
            )

    def load(self, state: Mapping[str, Any]) -> None:
        self.ier, self.fcr, self.lcr, self.mcr = (state[name] for name in ("ier", "fcr", "lcr", "mcr"))
        self.scr, self.msr = state["scr"], state["msr"]
        self.dlm, self.dll = divmod(state["divisor"], 256)
        self.overrun = bool(state["lsr_errors"] & LSR_OVERRUN)
        self.rx, self.tx = bytearray(state["rx_fifo"]), bytearray(state["tx_fifo"])
        self.thr_empty_pending = state["iir_thre_pending"]
        # False from version 1, which had neither: the character times begin anew, a pending interrupt is raised once more.
        self.timeout_pending = state["rx_timeout_pending"]
        self.interrupting = state["irq_raised"]


def _modem_lines(mcr: int) -> int:
    """MSR bits 4-7: a terminal that is always ready, or in loopback the chip's own outputs."""
    if not mcr & MCR_LOOP:
        return MSR_CTS | MSR_DSR | MSR_DCD
    wires = ((MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD))
    return sum(line for output, line in wires if mcr & output)


def _open_output(path: str) -> int:
    """A descriptor that appends and never blocks.

    A FIFO is opened for reading too: the device may start before its reader, and outlives one, without losing a byte.
    """
    try:
        mode = os.stat(path).st_mode if os.path.exists(path) else stat.S_IFREG
        access = os.O_RDWR if stat.S_ISFIFO(mode) else os.O_WRONLY | os.O_APPEND | os.O_CREAT
        return os.open(path, access | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UsageError(
            f"output={path} cannot be written: {error.strerror}",
            remedy="give a file, FIFO or terminal that this user may write; for a socket, put socat and a FIFO between",
        ) from None


def _open_input(path: str) -> int:
    """A descriptor to read bytes from without ever blocking.

    Not a file: the destination of a migration would read it from the start again. Not a socket: what lies unread in one
    is lost with the process. What lies unread in a FIFO is read by the destination, which has the same FIFO open.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISFIFO(mode) and not stat.S_ISCHR(mode):
            raise UsageError(f"input={path} is not a FIFO or a terminal", remedy=f"make one: mkfifo {path}")
        access = os.O_RDWR if stat.S_ISFIFO(mode) else os.O_RDONLY
        return os.open(path, access | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(
            f"input={path} cannot be read: {error.strerror}", remedy=f"make it: mkfifo {path}"
        ) from None


if __name__ == "__main__":
    main(Uart16550)
