"""The bus of a machine: its life, and who may do what on it."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from migrate.bus import Bus, PrivateBus
from migrate.errors import BusError, DeviceError, UsageError

OnBus = Callable[[Callable[[PrivateBus], Awaitable[Any]]], Any]


def running(private: PrivateBus) -> bool:
    return private.pid is not None


def pid_of(private: PrivateBus) -> int:
    assert private.pid is not None
    return private.pid


def test_it_comes_back_at_the_same_address_and_clients_connect_again(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        bus = await Bus.connect(private.address)
        lost = asyncio.Event()
        bus.on_disconnect(lost.set)
        first = pid_of(private)
        os.kill(first, signal.SIGKILL)
        assert await asyncio.wait_for(private.wait_died(), 5) == -signal.SIGKILL
        assert not running(private)
        await asyncio.wait_for(lost.wait(), 5)
        with pytest.raises(BusError):
            await Bus.connect(private.address)
        await private.start()
        again = await Bus.connect(private.address)
        assert await again.request_name("org.vmferry.Device1", queue=True)
        await private.restart()
        third = await Bus.connect(private.address)
        assert pid_of(private) != first
        for each in (bus, again, third):
            await each.close()

    on_bus(scenario)


def test_a_stopped_bus_leaves_no_process_and_no_socket(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        pid = pid_of(private)
        with pytest.raises(BusError, match="is running"):
            await private.start()
        await private.stop()
        await private.stop()
        assert not private.socket.exists()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    on_bus(scenario)


def test_it_dies_with_the_process_that_started_it(short_dir: Path) -> None:
    program = f"""
        import asyncio, pathlib
        from migrate.bus import PrivateBus

        async def main():
            bus = PrivateBus(pathlib.Path("{short_dir}/bus"))
            await bus.start()
            print(bus.pid, flush=True)
            await asyncio.Event().wait()

        asyncio.run(main())
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = os.pidfd_open(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    assert select.select([child], [], [], 10)[0], "dbus-daemon outlived its parent"
    os.close(child)


def test_it_does_not_take_over_the_socket_of_a_bus_that_runs(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        with pytest.raises(BusError, match="another bus answers"):
            await PrivateBus(private.socket).start()
        bus = await Bus.connect(private.address)
        await bus.close()

    on_bus(scenario)


@pytest.mark.parametrize("installed", [[], ["setpriv"]])
def test_a_missing_program_is_named_with_the_command_that_installs_it(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch, installed: list[str]
) -> None:
    for name in installed:
        (short_dir / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setattr("migrate.bus.daemon.SYSTEM_PATH", "")
    monkeypatch.setenv("PATH", str(short_dir))
    with pytest.raises(
        UsageError, match=r"is not installed \(as root: apt-get install (util-linux|dbus-daemon)\)"
    ):
        asyncio.run(PrivateBus(short_dir / "bus").start())


def test_a_daemon_that_does_not_come_up_says_why(short_dir: Path) -> None:
    async def main() -> None:
        with pytest.raises(BusError, match=r"(?i)no such file"):
            await PrivateBus(short_dir / "missing" / "bus").start()
        (short_dir / "bus").mkdir()  # nothing can be bound there
        with pytest.raises(BusError, match=r"did not start: .*(bind|in use|directory)"):
            await PrivateBus(short_dir / "bus").start()

    asyncio.run(main())


def test_a_directory_with_odd_characters_in_its_name_serves_as_well(short_dir: Path) -> None:
    async def main() -> None:
        odd = short_dir / "a,b;c d<&%é"
        odd.mkdir()
        private = PrivateBus(odd / "bus")
        await private.start()
        bus = await Bus.connect(private.address)
        await bus.close()
        await private.stop()

    asyncio.run(main())


def test_only_names_of_this_project_and_of_qemu_s_helpers_can_be_owned(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        bus = await Bus.connect(private.address)
        for name in ("org.qemu.VMState1", "org.vmferry.Device1", "org.vmferry.Supervisor"):
            assert await bus.request_name(name, queue=True)
        for name in ("org.freedesktop.systemd1", "org.qemu.Display1", "org.vmferryman"):
            with pytest.raises(BusError, match="AccessDenied"):
                await bus.request_name(name, queue=True)
        await bus.close()

    on_bus(scenario)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can try as another user")
@pytest.mark.parametrize("claims", [0, 65534])
def test_another_user_is_not_admitted_whatever_it_claims(
    on_bus: OnBus, monkeypatch: pytest.MonkeyPatch, claims: int
) -> None:
    async def scenario(private: PrivateBus) -> None:
        private.socket.parent.chmod(0o755)
        monkeypatch.setattr("migrate.bus.link.os.getuid", lambda: claims)
        os.seteuid(65534)
        try:
            with pytest.raises((BusError, DeviceError)):
                await Bus.connect(private.address)
        finally:
            os.seteuid(0)

    on_bus(scenario)
