"""All D-Bus: the private bus of a machine, connections with deadlines, the interfaces of device processes.

library.py alone imports the D-Bus library (its codec); messages.py and link.py are headers and the socket; connection.py is
`Bus`. service.py is what a process offers, as tables, exports.py looks it up, serving.py answers; failures.py is our errors
as D-Bus errors. daemon.py is the bus itself. device.py and client.py are the two ends of org.vmferry.Device1 (docs/dbus),
supervisor.py of org.vmferry.Supervisor1, host.py of org.vmferry.Host1. machine.py and job.py are the objects of management
beside it, status.py what they show; objects.py lets objects come, change and go, callers.py says who may change them.
"""

from migrate.bus.client import DeviceClient, DeviceInfo, discover
from migrate.bus.connection import Bus
from migrate.bus.daemon import PrivateBus
from migrate.bus.device import DeviceService, Disk, device_interfaces
from migrate.bus.service import Call, Interface, Method, Property, Signal

__all__ = [
    "Bus",
    "Call",
    "DeviceClient",
    "DeviceInfo",
    "DeviceService",
    "Disk",
    "Interface",
    "Method",
    "PrivateBus",
    "Property",
    "Signal",
    "device_interfaces",
    "discover",
]
