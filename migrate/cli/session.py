"""A command's talk with the daemon of its host: connect, do one thing, close."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

from migrate.bus.host import HostClient
from migrate.cli.output import Output
from migrate.cli.words import directory_of

T = TypeVar("T")


def with_host(args: argparse.Namespace, work: Callable[[HostClient], Awaitable[T]]) -> T:
    """Run `work` with a client of the daemon of --dir.

    :raises BusError: if none runs there. :raises FerryError: what `work` raises.
    """

    async def session() -> T:
        client = await HostClient.connect(directory_of(args))
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(session())


def tell(args: argparse.Namespace, word: str, action: Callable[[HostClient], Awaitable[None]]) -> int:
    """A command that tells the daemon one thing about a machine; `word` says what the machine is then."""
    output = Output(sys.stdout, sys.stderr, json=args.json)
    with_host(args, action)
    output.say(f"{args.name}: {word}")
    output.event({"event": "outcome", "outcome": word, "machine": args.name, "exit_code": 0})
    return 0
