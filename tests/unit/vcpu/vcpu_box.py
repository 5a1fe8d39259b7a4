"""A processor with a few MiB of memory and a program, for tests. Without Unicorn, whoever imports this is skipped."""

from __future__ import annotations

import pytest

pytest.importorskip("unicorn", reason="the vCPU needs Unicorn, an optional extra: pip install vmferry[vcpu]")

from devices.vcpu.engine import Engine
from devices.vcpu.platform_page import GPA, SIZE, PlatformPage
from devices.vcpu.runner import Runner
from migrate.memory.addresses import GuestAddress
from migrate.memory.region import GuestMemory, RegionSpec

MIB = 1 << 20
ENTRY = MIB
MEMORY = 4 * MIB


class Box:
    def __init__(self, program: bytes, eax: int = 0) -> None:
        self.memory = GuestMemory.create([RegionSpec(GuestAddress(0), MEMORY)], "box")
        self.region = self.memory.regions[0]
        self.region.view[ENTRY : ENTRY + len(program)] = program
        self.page = PlatformPage()
        self.engine = Engine()
        self.engine.map_ram(0, MEMORY, self.region.address)
        self.engine.map_window(GPA, SIZE, self.page.read, self.page.write)
        self.failures: list[Exception] = []
        self.runner = Runner(self.engine, self.page.wake, self.failures.append)
        self.engine.reset(ENTRY)
        registers = self.engine.registers()
        registers["gpr"][0] = eax
        self.engine.set_registers(registers)

    def step(self, instructions: int) -> None:
        """Execute without the runner's thread."""
        self.engine.stop_requested = False
        self.engine.run_slice(instructions)
        self.engine.stop_requested = True

    def word(self, gpa: int) -> int:
        return int.from_bytes(self.region.view[gpa : gpa + 8], "little")

    def close(self) -> None:
        self.runner.close()
        self.page.close()
        self.memory.close()

    def __enter__(self) -> Box:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
