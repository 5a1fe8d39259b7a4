"""A command's talk with the daemon of its host: connect, do one thing, close."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

from migrate.bus.addresses import address_of
from migrate.bus.host import HostClient
from migrate.cli.output import Output
from migrate.cli.words import where_of
from migrate.client import Host

T = TypeVar("T")


def with_host(args: argparse.Namespace, work: Callable[[HostClient], Awaitable[T]]) -> T:
    """Run `work` with a client of the daemon of --dir or --bus.

    :raises BusError: if none runs there. :raises FerryError: what `work` raises.
    """

    async def session() -> T:
        where = where_of(args)
        client = await HostClient.connect(address_of(where) if isinstance(where, str) else where)
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(session())


def with_client(args: argparse.Namespace, work: Callable[[Host], Awaitable[T]]) -> T:
    """The same with the objects of that daemon (migrate.client)."""

    async def session() -> T:
        async with await Host.connect(where_of(args)) as host:
            return await work(host)

    return asyncio.run(session())


def tell(args: argparse.Namespace, word: str, action: Callable[[HostClient], Awaitable[None]]) -> int:
    """A command that tells the daemon one thing about a machine; `word` says what the machine is then."""
    output = Output(sys.stdout, sys.stderr, json=args.json)
    with_host(args, action)
    output.say(f"{args.name}: {word}")
    output.event({"event": "outcome", "outcome": word, "machine": args.name, "exit_code": 0})
    return 0
