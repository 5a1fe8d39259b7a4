"""vfio-user, the protocol between a VMM (client) and a device process (server) over a Unix socket.

    messages.py     what is on the wire: headers, payloads, limits; no I/O
    framing.py      bytes and descriptors in, whole messages out; no I/O
    server.py       serves one device: one thread, one client at a time
    client.py       a VMM's side: blocking calls with deadlines

The source of all protocol facts is QEMU's docs/interop/vfio-user.rst (2025), and libvfio-user's behaviour where that is
silent. Migration (DEVICE_FEATURE, MIG_DATA_READ, MIG_DATA_WRITE), DMA_READ/WRITE and region descriptors are not here yet.
"""
