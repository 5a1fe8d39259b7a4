"""What a QEMU says of itself that the other side's must say too, and what it says against being migrated. It only reads."""

from __future__ import annotations

from typing import Any, Final

from devices.bridges.qemu.monitor import Monitor
from migrate.errors import Phase

#: Most PCI functions that are compared one by one; a machine has a handful.
_MOST_FUNCTIONS: Final = 40


def read(monitor: Monitor) -> dict[str, Any]:
    """:raise DeviceError: QEMU does not answer."""

    def ask(command: str, **arguments: Any) -> Any:
        return monitor.execute(command, arguments, phase=Phase.PREFLIGHT)

    version = ask("query-version")["qemu"]
    cpus = ask("query-cpus-fast")
    capabilities = ask("query-migrate-capabilities")
    return {
        "version": "{major}.{minor}.{micro}".format(**version),
        "machine": machine_type(monitor),
        "ram": ram(monitor),
        "cpus": len(cpus),
        "cpu": str(ask("qom-get", path=cpus[0]["qom-path"], property="type")).removesuffix("-x86_64-cpu"),
        "accel": "kvm" if ask("query-kvm")["enabled"] else "tcg",
        "blocked": [str(why) for why in ask("query-migrate").get("blocked-reasons", [])],
        "capabilities": [str(item["capability"]) for item in capabilities],
        "backend": _backend(monitor),
        "vmstate": any("dbus-vmstate" in str(item["type"]) for item in ask("qom-list", path="/objects")),
        "pci": _functions(ask("query-pci")),
    }


def _backend(monitor: Monitor) -> str:
    """The id of the object that is the guest's memory: QEMU's stream calls the memory by it."""
    found = monitor.execute(
        "qom-get", {"path": "/machine", "property": "memory-backend"}, phase=Phase.PREFLIGHT
    )
    return str(found).rpartition("/")[2] or "pc.ram"


def machine_type(monitor: Monitor) -> str:
    found = monitor.execute("qom-get", {"path": "/machine", "property": "type"}, phase=Phase.PREFLIGHT)
    return str(found).removesuffix("-machine")


def ram(monitor: Monitor) -> int:
    """Bytes, without what was plugged in later."""
    return int(monitor.execute("query-memory-size-summary", phase=Phase.PREFLIGHT)["base-memory"])


def cpus(monitor: Monitor) -> int:
    return len(monitor.execute("query-cpus-fast", phase=Phase.PREFLIGHT))


def _functions(buses: Any) -> dict[str, str]:
    """Vendor and device of every PCI function, by bus, slot and function."""
    found: dict[str, str] = {}

    def walk(devices: Any) -> None:
        for one in devices:
            where = f"{one['bus']:02x}.{one['slot']:02x}.{one['function']}"
            found[where] = f"{one['id']['vendor']:04x}.{one['id']['device']:04x}"
            walk(one.get("pci_bridge", {}).get("devices", []))

    for bus in buses:
        walk(bus["devices"])
    return dict(sorted(found.items())[:_MOST_FUNCTIONS])
