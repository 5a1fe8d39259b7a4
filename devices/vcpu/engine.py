"""The processor: Unicorn behind an interface of our own. The only file that imports it; knows no threads, devices or bus.

What Unicorn 2.1.4 really does, measured here (tests/unit/vcpu/test_engine.py holds it to that), decides how it is used:

- A stop from outside (`emu_stop` from another thread, or `timeout=`) is *not* exact. It takes effect after a memory access
  within an instruction, and the program counter is left on that instruction: `inc (mem)` is carried out twice, in 2506 of
  3000 stops. So it is never used. A slice of a counted number of instructions ends exactly between two instructions; the
  hook this costs takes 10 to 20 % from a guest that works on memory.
- `emu_stop` in a callback for a device window leaves the program counter on the accessing instruction, which is then carried
  out again. So a stop there *refuses* the access: it is not carried out at all, and is when the guest goes on.
- A count is ignored in code that was translated without one, so every slice has one.
- An access of 8 bytes to a window arrives as two of 4, low half first. A stop between them carries out the first again.
- In long mode without paging, which is what the guest gets, virtual addresses are physical ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import unicorn
from unicorn import x86_const

from migrate.errors import DeviceError, Phase
from migrate.memory.addresses import PAGE_SHIFT

#: Instructions in one slice: 0.1 to 1 ms, and 3 µs for starting it. It bounds how long a stop takes.
SLICE = 20_000

ReadWindow = Callable[[int, int], int]
WriteWindow = Callable[[int, int, int], None]

_GPR = tuple(
    getattr(x86_const, f"UC_X86_REG_{name}")
    for name in ("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", *(f"R{n}" for n in range(8, 16)))
)
_XMM = tuple(getattr(x86_const, f"UC_X86_REG_XMM{number}") for number in range(16))
_EFER = 0xC000_0080
#: Field of the schema → register. The order matters: what switches modes first, what depends on them after.
_PLAIN = {
    "cr4": x86_const.UC_X86_REG_CR4,
    "cr3": x86_const.UC_X86_REG_CR3,
    "cr0": x86_const.UC_X86_REG_CR0,
    "cr2": x86_const.UC_X86_REG_CR2,
    "fs_base": x86_const.UC_X86_REG_FS_BASE,
    "gs_base": x86_const.UC_X86_REG_GS_BASE,
    "rflags": x86_const.UC_X86_REG_RFLAGS,
    "rip": x86_const.UC_X86_REG_RIP,
    "mxcsr": x86_const.UC_X86_REG_MXCSR,
}

#: State after power-on. Flags by the names of the SDM, vol. 3, 2.2.1 and 2.5; mxcsr by vol. 1, 10.2.3.1.
_RESET: Mapping[str, Any] = {
    "cr0": 0x11,  # PE, ET
    "cr4": 0x5_0200,  # OSFXSR, FSGSBASE, OSXSAVE
    "efer": 0x500,  # LME, LMA
    "rflags": 0x2,
    "mxcsr": 0x1F80,
    "gpr": [0] * 16,
    "xmm": [bytes(16)] * 16,
    **dict.fromkeys(("cr2", "cr3", "fs_base", "gs_base"), 0),
}


class GuestFault(DeviceError):
    """The guest did what the processor cannot carry on from: an invalid instruction, an address where nothing is."""


class Engine:
    """One processor. Not locked: `stop_requested` may be set by any thread, all else belongs to who executes slices."""

    def __init__(self) -> None:
        self._uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        #: While set, no slice begins, and an access to a window is refused, which ends the slice.
        self.stop_requested = False
        self._failure: BaseException | None = None
        self._fill_hook: int | None = None

    # -- what it sees ---------------------------------------------------------------------------------------------------

    def map_ram(self, gpa: int, size: int, address: int) -> None:
        """Guest RAM is `size` bytes at `address` of this process, which stay mapped for as long as this object lives."""
        self._uc.mem_map_ptr(gpa, size, unicorn.UC_PROT_ALL, address)

    def map_window(self, gpa: int, size: int, read: ReadWindow, write: WriteWindow) -> None:
        """Accesses to these addresses are calls: `read(offset, size)` and `write(offset, size, value)`, 1, 2 or 4 bytes.

        What they raise ends the slice, comes out of `run_slice`, and leaves the guest before that access.
        """

        def on_read(uc: Any, offset: int, size: int, user: Any) -> int:
            if not self.stop_requested:
                try:
                    return read(offset, size)
                except BaseException as error:  # carried across C to run_slice
                    self._failure = error
            uc.emu_stop()
            return 0

        def on_write(uc: Any, offset: int, size: int, value: int, user: Any) -> None:
            if not self.stop_requested:
                try:
                    write(offset, size, value)
                    return
                except BaseException as error:  # carried across C to run_slice
                    self._failure = error
            uc.emu_stop()

        self._uc.mmio_map(gpa, size, on_read, None, on_write, None)

    # -- executing --------------------------------------------------------------------------------------------------------

    def run_slice(self, instructions: int = SLICE) -> None:
        """Execute so many instructions, or up to an access that is refused. Returns at once when a stop is requested.

        The GIL is released meanwhile, but for accesses to windows.

        :raise GuestFault: the guest cannot go on. Whatever a window's function raised.
        """
        if self.stop_requested:
            return
        try:
            # No address ends the slice: 0 is never executed, it is where the interrupt vectors of another age were.
            self._uc.emu_start(self._uc.reg_read(x86_const.UC_X86_REG_RIP), 0, count=instructions)
        except unicorn.UcError as error:
            raise GuestFault(
                f"the guest cannot go on at {self.rip:#x}: {error}",
                remedy="the guest program is at fault, or its memory is damaged; look at its last output",
                phase=Phase.RUNNING,
            ) from None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    @property
    def rip(self) -> int:
        rip: int = self._uc.reg_read(x86_const.UC_X86_REG_RIP)
        return rip

    # -- registers, by the names of schemas/vcpu.toml -----------------------------------------------------------------------

    def registers(self) -> dict[str, Any]:
        read = self._uc.reg_read
        values: dict[str, Any] = {name: read(register) for name, register in _PLAIN.items()}
        values["efer"] = read(x86_const.UC_X86_REG_MSR, _EFER)
        values["gpr"] = [read(register) for register in _GPR]
        values["xmm"] = [read(register).to_bytes(16, "little") for register in _XMM]
        return values

    def set_registers(self, values: Mapping[str, Any]) -> None:
        write = self._uc.reg_write
        write(x86_const.UC_X86_REG_MSR, (_EFER, values["efer"]))
        for name, register in _PLAIN.items():
            write(register, values[name])
        for register, value in zip(_GPR, values["gpr"], strict=True):
            write(register, value)
        for register, value in zip(_XMM, values["xmm"], strict=True):
            write(register, int.from_bytes(value, "little"))
        self.forget_translations()

    def reset(self, entry: int) -> None:
        """As a loader hands over to a kernel: long mode without paging, SSE usable, at `entry`."""
        self.set_registers({**_RESET, "rip": entry})

    def forget_translations(self) -> None:
        """Memory changed behind the processor's back: what it translated from there may be stale."""
        self._uc.ctl_flush_tb()
        self.flush_tlb()

    # -- the log of written pages ---------------------------------------------------------------------------------------

    def log_writes(self, marks: Sequence[tuple[int, bytearray]]) -> None:
        """From now on set the byte of every page that the guest is about to write.

        The processor's own TLB does it: a page that was only read so far is entered without the right to write, so the
        first write comes here. `flush_tlb` after the bytes were cleared makes the next first write come here again.

        :param marks: for each region of RAM: its first page's number (gpa >> 12), and one byte a page.
        """
        regions = [(first, first + len(marked), marked) for first, marked in marks]
        write = unicorn.UC_MEM_WRITE
        everything, but_write = unicorn.UC_PROT_ALL, unicorn.UC_PROT_READ | unicorn.UC_PROT_EXEC

        def fill(uc: Any, address: int, access: int, entry: Any, user: Any) -> bool:
            page = address >> PAGE_SHIFT
            entry.paddr = address
            entry.perms = everything
            for first, end, marked in regions:
                if first <= page < end:
                    if access == write:
                        marked[page - first] = 1
                    elif not marked[page - first]:
                        entry.perms = but_write
                    break
            return True

        self.stop_logging()
        self._uc.ctl_set_tlb_mode(unicorn.UC_TLB_VIRTUAL)
        self._fill_hook = self._uc.hook_add(unicorn.UC_HOOK_TLB_FILL, fill)
        self.flush_tlb()

    def stop_logging(self) -> None:
        if self._fill_hook is not None:
            self._uc.hook_del(self._fill_hook)
            self._fill_hook = None
            self._uc.ctl_set_tlb_mode(unicorn.UC_TLB_CPU)
            self.flush_tlb()

    def flush_tlb(self) -> None:
        """Takes 1 µs; what was translated stays."""
        # The binding has no name of its own for this control.
        self._uc.ctl(unicorn.UC_CTL_TLB_FLUSH, unicorn.UC_CTL_IO_WRITE)
