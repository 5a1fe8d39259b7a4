"""The same helpers in a machine of ours whose VMM is QEMU: opaque participants, for they have org.qemu.VMState1 and no more."""

from __future__ import annotations

import json
import re
import sys
from datetime import datetime
from typing import Final

from tests.faults.leftovers import Pen
from tests.faults.rig import MACHINE, Host, keys_for
from tests.interop.eleven.alone import QEMU, ROOT
from tests.interop.eleven.rows import Record, Row, Words

COMMAND: Final = (QEMU, "-M", "pc", "-accel", "tcg", "-nodefaults", "-display", "none")
#: Not a multiple of 256 KiB: see docs/qemu.md.
MEMORY: Final = "65544K"


def _command(words: Words) -> list[str]:
    return ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "tests.interop.eleven.helper", *words]


class Rig:
    def __init__(self, pen: Pen) -> None:
        self.pen = pen
        keys = keys_for(pen, "hosta", "hostb")
        self.a = Host(pen, "hosta", keys=keys["hosta"])
        self.b = Host(
            pen, "hostb", keys=keys["hostb"], toml=f"[qemu.{MACHINE}]\ncommand = {json.dumps(COMMAND)}\n"
        )
        for host in (self.a, self.b):
            host.start()

    def close(self) -> None:
        for host in (self.a, self.b):
            host.close()

    def run(self, row: Row) -> Record:
        record = Record(row.name, "ferry")
        self.a.clear()
        self.b.clear()
        names = [*row.source, *(name for name in row.id_list if name not in row.source)]
        devices = "".join(
            f'[[device]]\nid = "{name}"\ntype = "helper-{name}"\n'
            f"command = {json.dumps(_command(row.source[name]) if name in row.source else ['sleep', '60'])}\n"
            for name in names
        )
        toml = self.pen.directory / "eleven.toml"
        toml.write_text(
            f'[machine]\nname = "{MACHINE}"\nmemory = "{MEMORY}"\n[qemu]\ncommand = {json.dumps(COMMAND)}\n{devices}'
        )
        offers = "".join(
            f"[device.helper-{name}]\n"
            + (
                f"command = {json.dumps(_command(row.destination[name]))}\n"
                if name in row.destination
                else "available = false\n"
            )
            for name in row.source
        )
        (self.b.directory / "host.toml").write_text(
            f"[qemu.{MACHINE}]\ncommand = {json.dumps(COMMAND)}\n{offers}"
        )
        said = self.a.ferry("run", str(toml), "--fresh", "--json")
        if said.code:
            # Found before there was a guest at all.
            [reason] = said.outcome["reasons"]
            record.status, record.reason, record.device = (
                "not started",
                reason["reason"],
                reason["device"] or "",
            )
            record.guest = "not started"
            return record
        said = self.a.ferry("migrate", MACHINE, "--to", self.b.tls, "--json")
        outcome = said.outcome
        record.status = f"{outcome['outcome']} (exit {outcome['exit_code']})"
        if outcome["reasons"]:
            record.reason, record.device = (
                outcome["reasons"][0]["reason"],
                outcome["reasons"][0]["device"] or "",
            )
        here, there = self.a.state() == "running", self.b.state() == "running"
        record.guest = {(1, 0): "source", (0, 1): "destination", (1, 1): "both", (0, 0): "nowhere"}[
            here, there
        ]
        record.frozen_ms = outcome["downtime_ms"] or self._still()
        return record

    def _still(self) -> float:
        """How long the source's guest stood still, ms, by QEMU's own STOP and RESUME."""
        log = (self.a.directory / "machines" / MACHINE / "vcpu0.log").read_text()
        begin = log.rindex("event=qemu-started")
        found = re.findall(r"time=(\S+ \S+) .*event=qemu name=(STOP|RESUME)", log[begin:])
        stopped: datetime | None = None
        longest = 0.0
        for when, what in found:
            at = datetime.strptime(when, "%Y-%m-%d %H:%M:%S,%f")
            if what == "STOP":
                stopped = at
            elif stopped is not None:
                longest = max(longest, (at - stopped).total_seconds() * 1000)
        return longest


def all_of(pen: Pen, rows: tuple[Row, ...]) -> list[Record]:
    rig = Rig(pen)
    try:
        return [rig.run(row) for row in rows]
    finally:
        rig.close()
