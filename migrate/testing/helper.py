"""A helper of org.qemu.VMState1 and nothing more, right or with one fault:

    python -m migrate.testing.helper FAULT --id ID --bus ADDRESS

Its state is a few bytes of its own making, without a checksum, as helpers have that were not written for vmferry.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from collections.abc import Mapping
from typing import Any, Final

from migrate.bus import Bus, Call, Interface, Method, Property
from migrate.errors import DeviceRefused

#: What it does wrong, by name.
FAULTS: Final[Mapping[str, str]] = {
    "right": "nothing",
    "hang-save": "Save never answers",
    "oversize": "Save gives more than QEMU's 1 MiB",
    "refuse-save": "Save answers with an error",
    "wrong-type": "Save answers with text, and says so in its signature",
    "dies": "it is killed in the middle of Save",
    "mutates": "Save changes the state",
    "refuse-load": "Load refuses what Save gave",
    "half-load": "Load takes half over, then refuses",
    "takes-all": "Load takes whatever it is given",
    "terse": "a refusal says nothing",
    "traceback": "a refusal has a traceback in it",
    "no-id": "its Id is empty",
    "long-id": "its Id has 300 bytes",
}
PATH, NAME = "/org/qemu/VMState1", "org.qemu.VMState1"


class Helper:
    def __init__(self, kind: str, device_id: str) -> None:
        self.kind, self.id = kind, device_id
        self.state = b"\x05state"

    async def save(self, _call: Call) -> Any:
        match self.kind:
            case "hang-save":
                await asyncio.sleep(3600)
            case "oversize":
                return bytes((1 << 20) + 1)
            case "refuse-save":
                raise DeviceRefused("told to refuse", remedy="do not ask")
            case "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            case "mutates":
                self.state = bytes((5,)) + bytes((self.state[1] + 1,)) + self.state[2:]
            case "wrong-type":
                return "text"
        return self.state

    async def load(self, _call: Call, data: bytes) -> None:
        if self.kind == "takes-all":
            self.state = bytes(data)
            return
        if self.kind == "half-load":
            self.state = bytes(data)[:3].ljust(6, b"?")
        if self.kind == "refuse-load" or len(data) != 6 or data[0] != 5:
            text = "no" if self.kind == "terse" else f"{len(data)} bytes are no state of mine"
            if self.kind == "traceback":
                text = 'Traceback (most recent call last): File "/opt/helper.py", line 3'
            raise DeviceRefused(text, remedy="give what was saved")
        self.state = bytes(data)

    def interface(self) -> Interface:
        ident: Any = "" if self.kind == "no-id" else "x" * 300 if self.kind == "long-id" else self.id
        gives = "s" if self.kind == "wrong-type" else "ay"
        return Interface(
            NAME,
            methods=[
                Method("Save", "", gives, (), ("data",), self.save),
                Method("Load", "ay", "", ("data",), (), self.load),
            ],
            properties=[Property("Id", "s", lambda: ident)],
        )


async def serve(kind: str, device_id: str, address: str) -> None:
    bus = await Bus.connect(address)
    bus.export(PATH, Helper(kind, device_id).interface())
    await bus.request_name(NAME, queue=True)
    await bus.closed.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=FAULTS)
    parser.add_argument("--id", required=True)
    parser.add_argument("--bus", required=True)
    words = parser.parse_args()
    asyncio.run(serve(words.kind, words.id, words.bus))
