"""Multi-process QEMU's protocol (QEMU 7.2, docs/system/multi-process.rst): devices of ours behind `x-pci-proxy-dev`, and calls to a
device in a QEMU of the machine type `x-remote`.

messages.py    what is on the wire
session.py     what one message does to the device behind it. No I/O
server.py      what comes in and goes out of its socket
client.py      the other end

Not in this protocol, and so not here: a version, MSI and MSI-X, a dirty log, anything about migration. QEMU itself says that
a machine with an `x-pci-proxy-dev` does not migrate.
"""
