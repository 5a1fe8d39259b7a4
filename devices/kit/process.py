"""The life of a participant's process: its arguments, its log, its bus, its end.

start   --paused: STOP, cold. --incoming: RESUMING, waiting for a state. Neither: RUNNING, for use under plain QEMU
serve   the VMM's socket (devices) and the machine's bus, which it finds again whenever the bus dies
end     SIGTERM, SIGINT, or the death of the process that started it, which is certain (PR_SET_PDEATHSIG, SIGKILL)
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from devices.kit.device import Device
from devices.kit.mpqemu import MpqemuBackend
from devices.kit.participant import Participant
from devices.kit.runtime import BUS, VFIO_USER, Runtime
from devices.kit.service import ControlThread, Service
from devices.kit.tracking import COMPARE
from devices.kit.vfio_user import VfioUserBackend
from devices.protocols.mpqemu.server import Server as MpqemuServer
from devices.protocols.serving import OneClientServer
from devices.protocols.vfio_user.server import Server as VfioUserServer
from migrate.bus.connection import Bus
from migrate.bus.device import PATH, device_interfaces
from migrate.errors import BusError, FerryError, Phase, UsageError
from migrate.state.lifecycle import DeviceState

log = logging.getLogger(__name__)

#: Of `--protocol`, beside vfio-user.
MPQEMU, VHOST_USER = "mpqemu", "vhost-user"

_PR_SET_PDEATHSIG = 1
#: Where the bus is, for a process that QEMU's user starts by hand: QEMU's own convention, then the session's bus.
_ADDRESS_VARIABLES = ("DBUS_VMSTATE_ADDRESS", "DBUS_SESSION_BUS_ADDRESS")
#: Seconds between attempts to find a bus that died: at first, and at most.
_RETRY_FIRST, _RETRY_MOST = 0.02, 1.0
#: Seconds that the end of the process waits for a device that is busy.
_PATIENCE = 1.0


def argument_parser(type_name: str, doc: str | None = None) -> argparse.ArgumentParser:
    """The arguments that every participant's process takes. A participant's own go beside them, before parsing."""
    parser = argparse.ArgumentParser(
        prog=type_name,
        description=(doc or "").strip().split("\n", 1)[0].replace("%", "%%"),
        allow_abbrev=False,
    )
    parser.add_argument("--id", required=True, type=_id, help="its Id on the bus: 1 to 255 printable bytes")
    parser.add_argument(
        "--bus", metavar="ADDRESS", help=f"D-Bus address; default: ${' or $'.join(_ADDRESS_VARIABLES)}"
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--paused", action="store_true", help="start stopped, in the state after power-on")
    start.add_argument("--incoming", action="store_true", help="start waiting for a state to be loaded")
    parser.add_argument(
        "--tracker",
        choices=("scan", "log", COMPARE),
        help="how written guest memory is tracked; default: the best that works here",
    )
    parser.add_argument(
        "--max-version", type=int, metavar="N", help="behave as the release whose newest schema version was N"
    )
    parser.add_argument("--verbose", action="store_true", help="log more")
    return parser


def _id(text: str) -> str:
    if not 1 <= len(text.encode()) <= 255 or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no Id: 1 to 255 printable bytes")
    return text


def main(
    device_class: type[Device],
    argv: Sequence[str] | None = None,
    *,
    vhost_user: type[Device] | None = None,
) -> NoReturn:
    """A device's whole process.

    :param vhost_user: the same device behind vhost-user, where another is the PCI function. It has an option of that name.
    """
    parser = argument_parser(device_class.type, sys.modules[device_class.__module__].__doc__)
    parser.add_argument("--socket", metavar="PATH", help="serve the VMM on this Unix socket")
    parser.add_argument(
        "--protocol",
        choices=(VFIO_USER, MPQEMU, *((VHOST_USER,) if vhost_user is not None else ())),
        default=VFIO_USER,
        help="what is spoken there; mpqemu: with QEMU's x-pci-proxy-dev; default: vfio-user",
    )
    parser.add_argument(
        "--migration",
        choices=(BUS, VFIO_USER),
        default=BUS,
        help="who moves it: the supervisor of its machine, over the bus, or the VMM, over vfio-user; default: bus",
    )
    classes = (device_class, *((vhost_user,) if vhost_user is not None else ()))
    options = {name: text for one in reversed(classes) for name, text in one.options.items()}
    known = "; ".join(f"{name}: {text}" for name, text in options.items())
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=known.replace("%", "%%") or "this type has none",
    )
    arguments = parser.parse_args(argv)
    if arguments.protocol != VFIO_USER and not arguments.socket:
        parser.error(f"--protocol {arguments.protocol} without --socket PATH")
    if arguments.protocol == VHOST_USER and vhost_user is not None:
        device_class = vhost_user
        arguments.option.append(f"vhost_user={arguments.socket}")
        arguments.socket = None
    _exit_with(lambda: _serve_device(device_class, arguments), arguments)


def run(
    participant: Participant, arguments: argparse.Namespace, server: OneClientServer | None = None
) -> NoReturn:
    """Serve a participant that is no device (the vCPU) on its machine's bus, until the process ends.

    :param arguments: parsed by what `argument_parser` gave. :param server: what its VMM is served by, if it has one.
    """
    _exit_with(lambda: _serve(participant, _runtime(participant, arguments), arguments, server), arguments)


def _serve_device(device_class: type[Device], arguments: argparse.Namespace) -> None:
    device = device_class(arguments.id, _options(device_class, arguments.option))
    if device_class.streams != (device.streamed is not None):
        raise UsageError(
            f"{device_class.__name__}.streams is {device_class.streams}, and its setup() says otherwise",
            remedy="set `streams = True` if and only if setup() calls self.stream()",
        )
    if arguments.migration == VFIO_USER and not arguments.socket:
        raise UsageError("--migration vfio-user without a socket", remedy="give --socket PATH")
    if arguments.migration == VFIO_USER and arguments.protocol != VFIO_USER:
        raise UsageError(
            f"--migration vfio-user with --protocol {arguments.protocol}",
            remedy="a VMM moves a device over vfio-user only: leave one of the two out",
        )
    runtime = _runtime(device, arguments, arguments.migration)
    _serve(device, runtime, arguments, _server(device, runtime, arguments))


def _server(device: Device, runtime: Runtime, arguments: argparse.Namespace) -> OneClientServer | None:
    """What the VMM is served by. Behind vhost-user the device has a server of its own."""
    if not arguments.socket:
        return None
    if arguments.protocol == MPQEMU:
        return MpqemuServer(arguments.socket, MpqemuBackend(device, runtime))
    return VfioUserServer(arguments.socket, VfioUserBackend(device, runtime))


def _serve(
    participant: Participant,
    runtime: Runtime,
    arguments: argparse.Namespace,
    server: OneClientServer | None = None,
) -> None:
    """Until a signal says to end. Everything that can be wrong is found before the first name is requested."""
    try:
        if arguments.incoming:
            runtime.set_state(DeviceState.RESUMING)
        elif not arguments.paused:
            runtime.start()
        if server is not None:
            server.start()
        if runtime.moved_by == VFIO_USER and not _find_address(arguments):
            asyncio.run(_until_told(asyncio.Event()))
        else:
            asyncio.run(_follow_bus(Service(runtime, ControlThread()), _address(arguments)))
    finally:
        if server is not None:
            server.close()
        # Without the lock if need be: a device that hangs has no right to a clean end.
        held = participant.lock.acquire(timeout=_PATIENCE)
        with contextlib.suppress(Exception):
            participant.close()
        if held:
            participant.lock.release()


# -- the bus ---------------------------------------------------------------------------------------------------------------


def _on_signal(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)


async def _until_told(stop: asyncio.Event) -> None:
    """Without a bus: a device that its VMM moves needs none."""
    _on_signal(stop)
    log.info("event=ready bus=none")
    await stop.wait()


async def _follow_bus(service: Service, address: str) -> None:
    """Be on the bus until SIGTERM or SIGINT. Where it dies, state and memory are kept and it is looked for again."""
    stop = asyncio.Event()
    _on_signal(stop)
    interfaces = device_interfaces(service)
    found, pause = False, _RETRY_FIRST
    while not stop.is_set():
        bus: Bus | None = None
        try:
            bus = await Bus.connect(address)
            bus.export(PATH, *interfaces)
            service.on_bus(bus)
            for name in service.names:
                await bus.request_name(name, queue=True)
            gc.freeze()  # no collection walks what is there by now, least of all while the machine stands still
            log.info("event=ready state=%s bus=%s name=%s", service.state, address, bus.unique_name)
            found, pause = True, _RETRY_FIRST
            await _first(stop.wait(), bus.closed.wait())
            if not stop.is_set():
                log.warning("event=bus-lost bus=%s", address)
        except BusError as error:
            if not found:
                raise
            log.debug("event=bus-away reason=%r", error.reason)
        finally:
            if bus is not None:
                await bus.close()
        if not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), pause)
            pause = min(2 * pause, _RETRY_MOST)


async def _first(*awaitables: object) -> None:
    tasks = [asyncio.ensure_future(one) for one in awaitables]  # type: ignore[call-overload]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def _find_address(arguments: argparse.Namespace) -> str:
    address: str = arguments.bus or ""
    for name in _ADDRESS_VARIABLES:
        address = address or os.environ.get(name, "")
    return address


def _address(arguments: argparse.Namespace) -> str:
    address = _find_address(arguments)
    if not address:
        raise UsageError(
            "no address of a message bus",
            remedy=f"give --bus, or set {' or '.join(_ADDRESS_VARIABLES)}",
        )
    return address


# -- the process -----------------------------------------------------------------------------------------------------------


def _exit_with(serve: Callable[[], None], arguments: argparse.Namespace) -> NoReturn:
    """Run to the end and exit: 0, or one clear line and the error's exit code."""
    _die_with_parent()
    _log_to_stderr(arguments.id, verbose=arguments.verbose)
    try:
        serve()
    except FerryError as error:
        error.device = error.device or arguments.id
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except Exception:
        log.exception("event=crashed")
        print(
            f"error: {arguments.id}: its process failed; the traceback is above", file=sys.stderr, flush=True
        )
        sys.exit(1)
    log.info("event=ended")
    sys.exit(0)


def _die_with_parent() -> None:
    """No orphan: the kernel kills this process when the thread that started it ends, also by SIGKILL.

    SIGKILL and not SIGTERM, because a vCPU that outlives its supervisor for a moment is a machine that nobody controls.
    """
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)  # it ended before the kernel was told


def _log_to_stderr(device: str, *, verbose: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter(f"time=%(asctime)s level=%(levelname)s device={device!r} %(message)s")
    )
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)


def _runtime(participant: Participant, arguments: argparse.Namespace, moved_by: str = BUS) -> Runtime:
    return Runtime(
        participant, tracker=arguments.tracker, max_version=arguments.max_version, moved_by=moved_by
    )


def _options(device_class: type[Device], pairs: Sequence[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key not in device_class.options or key in options:
            what = "is given twice" if key in options else "is unknown" if equals else "has no value"
            raise UsageError(
                f"--option {pair}: {key!r} {what}",
                remedy=f"a {device_class.type} has: {', '.join(device_class.options) or 'no options'}",
                phase=Phase.SETUP,
            )
        options[key] = value
    return options
