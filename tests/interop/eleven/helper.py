"""A helper of org.qemu.VMState1 and nothing more, wrong in the way that its words say:

python -m tests.interop.eleven.helper --id ID --bus ADDRESS [--size N] [--save-seconds S] [--save-error] [--load-error]
"""

from __future__ import annotations

import argparse
import asyncio
import os
from typing import Any

from migrate.bus import Bus, Call, Interface, Method, Property
from migrate.errors import DeviceRefused

PATH, NAME = "/org/qemu/VMState1", "org.qemu.VMState1"


async def serve(words: argparse.Namespace) -> None:
    async def save(_call: Call) -> bytes:
        await asyncio.sleep(words.save_seconds)
        if words.save_error:
            raise DeviceRefused("told to fail at Save", remedy="do not ask")
        return os.urandom(words.size)

    async def load(_call: Call, _data: bytes) -> None:
        if words.load_error:
            raise DeviceRefused("told to fail at Load", remedy="do not ask")

    says: Any = words.says or words.id
    bus = await Bus.connect(words.bus)
    interface = Interface(
        NAME,
        methods=[
            Method("Save", "", "ay", (), ("data",), save),
            Method("Load", "ay", "", ("data",), (), load),
        ],
        properties=[Property("Id", "s", lambda: says)],
    )
    bus.export(PATH, interface)
    await bus.request_name(NAME, queue=True)
    await bus.closed.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--id", required=True)
    parser.add_argument("--bus", required=True)
    parser.add_argument("--says", default="", help="the Id that it claims, instead of its own")
    parser.add_argument("--size", type=int, default=100)
    parser.add_argument("--save-seconds", type=float, default=0.0)
    parser.add_argument("--save-error", action="store_true")
    parser.add_argument("--load-error", action="store_true")
    parser.add_argument("--paused", action="store_true", help="as our devices take it; it means nothing here")
    parser.add_argument("--incoming", action="store_true")
    asyncio.run(serve(parser.parse_args()))
