"""vhost-user, the protocol between QEMU (front end) and a virtio device process (back end) over a Unix socket.

    messages.py     what is on the wire: headers, payloads, limits; no I/O
    log.py          the dirty log that QEMU shares between all its back ends
    memory.py       the guest's memory as a table of mapped regions, and writes into it that are logged
    session.py      what a back end answers, and the state of its rings
    server.py       serves one device: one thread, one front end at a time

The source of all protocol facts is QEMU's docs/interop/vhost-user.rst, and what QEMU 7.2 was seen to do where that is silent.
"""
