"""A driver for an LSI 53C895A with one disk, in the controller's own language: one SCSI command at a time, as the guest's scsi.c.

SCRIPTS: two words an instruction (LSI53C895A manual, chapter 5). A command selects the target, and follows the phases of the bus
until the target is done; reselection is waited for by the controller, so no processor takes part until the last interrupt.
"""

from __future__ import annotations

import os
import struct
import time
from typing import Final, Protocol

DATA_OUT, DATA_IN, COMMAND, STATUS, MESSAGE_OUT, MESSAGE_IN = 0, 1, 2, 3, 6, 7
#: Registers.
SCNTL1, DSTAT, ISTAT, DSP, DSPS, DIEN, SIEN0, SIST0 = 0x01, 0x0C, 0x14, 0x2C, 0x30, 0x39, 0x40, 0x42
CONNECTED, DMA_INTERRUPT, SCSI_INTERRUPT = 0x10, 0x01, 0x02
DONE, NO_PHASE, NO_TARGET = 1, 2, 3
#: Where the program and what it moves lie in guest memory.
PROGRAM, CDB, IDENTIFY, MESSAGE, STATUS_BYTE, DATA = 0x10000, 0x10800, 0x10810, 0x10818, 0x10820, 0x20000


def _move(phase: int, count: int, address: int) -> tuple[int, int]:
    return phase << 24 | count, address


def _jump(
    to: int, phase: int | None = None, *, wait: bool = False, first: int | None = None
) -> tuple[int, int]:
    """Always; or if the phase is that (which may be waited for); or if the last byte moved is that."""
    word = 0x8008_0000
    if phase is not None:
        word |= phase << 24 | 1 << 17 | wait << 16
    if first is not None:
        word |= 1 << 18 | first
    return word, to


def _interrupt(what: int) -> tuple[int, int]:
    return 0x9808_0000, what


_CLEAR_ACK, _WAIT_DISCONNECT = (0x6000_0040, 0), (0x4800_0000, 0)


def program(command_size: int, data_size: int, target: int = 0, base: int = PROGRAM) -> bytes:
    labels: dict[str, int] = {}
    for _ in range(2):  # the second time it is known where the labels are
        code: list[tuple[int, int]] = []

        def label(name: str, code: list[tuple[int, int]] = code) -> None:
            labels[name] = base + 8 * len(code)

        def at(name: str) -> int:
            return labels.get(name, 0)

        code += [
            (0x4100_0000 | target << 16, at("nobody")),  # select, with attention
            _move(MESSAGE_OUT, 1, IDENTIFY),
            _move(COMMAND, command_size, CDB),
        ]
        label("next")
        code += [
            _jump(at("message"), MESSAGE_IN, wait=True),
            _jump(at("in"), DATA_IN),
            _jump(at("out"), DATA_OUT),
            _jump(at("status"), STATUS),
            _interrupt(NO_PHASE),
        ]
        label("message")
        code += [
            _move(MESSAGE_IN, 1, MESSAGE),
            _jump(at("disconnect"), first=4),
            _CLEAR_ACK,
            _jump(at("next")),
        ]
        label("disconnect")
        code += [_CLEAR_ACK, _WAIT_DISCONNECT, (0x5000_0000, at("nobody")), _jump(at("next"))]
        label("in")
        code += [_move(DATA_IN, data_size, DATA), _jump(at("next"))]
        label("out")
        code += [_move(DATA_OUT, data_size, DATA), _jump(at("next"))]
        label("status")
        code += [
            _move(STATUS, 1, STATUS_BYTE), _move(MESSAGE_IN, 1, MESSAGE), _CLEAR_ACK, _WAIT_DISCONNECT, _interrupt(DONE),
        ]  # fmt: skip
        label("nobody")
        code += [_interrupt(NO_TARGET)]
    return b"".join(struct.pack("<II", *each) for each in code)


class Registers(Protocol):
    def read(self, offset: int) -> int: ...
    def write(self, offset: int, value: int) -> None: ...


#: Seconds that a command may take.
_PATIENCE: Final = 10.0


class Controller:
    """:param memory: descriptor of guest memory, from address 0."""

    def __init__(self, registers: Registers, memory: int) -> None:
        self._registers = registers
        self._memory = memory

    def open(self) -> None:
        """Interrupts on, and the disk's first word (that it was reset) heard."""
        for register, mask in ((DIEN, 0x7D), (SIEN0, 0xFF), (SIEN0 + 1, 0x1F)):
            self._registers.write(register, mask)
        while self.command(bytes(6)):
            pass

    def start(self, command: bytes, size: int = 0) -> None:
        os.pwrite(self._memory, program(len(command), size), PROGRAM)
        os.pwrite(self._memory, command.ljust(16, b"\0"), CDB)
        os.pwrite(self._memory, b"\x80", IDENTIFY)
        os.pwrite(self._memory, b"\xff", STATUS_BYTE)
        for byte in range(4):
            self._registers.write(DSP + byte, PROGRAM >> 8 * byte & 0xFF)

    def finish(self, seconds: float = _PATIENCE) -> int:
        """The command's status, once it is there."""
        deadline = time.monotonic() + seconds
        while not (status := self._registers.read(ISTAT)) & (DMA_INTERRUPT | SCSI_INTERRUPT):
            assert time.monotonic() < deadline, f"no end of the command: ISTAT {status:#x}"
            time.sleep(0.0005)
        assert not status & SCSI_INTERRUPT, f"SIST {self._registers.read(SIST0):#x}"
        assert self._registers.read(DSPS) == DONE
        self._registers.read(DSTAT)  # which takes the interrupt back
        return os.pread(self._memory, 1, STATUS_BYTE)[0]

    def command(self, command: bytes, size: int = 0) -> int:
        self.start(command, size)
        return self.finish()

    def read(self, sector: int, count: int) -> bytes:
        assert self.command(read(sector, count), 512 * count) == 0
        return os.pread(self._memory, 512 * count, DATA)

    def write(self, sector: int, data: bytes) -> None:
        os.pwrite(self._memory, data, DATA)
        assert self.command(struct.pack(">BBIBHB", 0x2A, 0, sector, 0, len(data) // 512, 0), len(data)) == 0


def read(sector: int, count: int) -> bytes:
    """READ (10)."""
    return struct.pack(">BBIBHB", 0x28, 0, sector, 0, count, 0)
