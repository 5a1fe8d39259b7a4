"""vfio-user, the protocol between a VMM (client) and a device process (server) over a Unix socket. docs/vfio-user.md.

    what is on the wire, no I/O     messages.py  version.py  region_messages.py  feature_messages.py  framing.py
    a server                        server.py (socket and thread), session.py (one client's connection), and what it answers
                                    about regions.py, interrupts.py, features.py; client_link.py asks the client for memory;
                                    backend.py says what stands behind it; dma_log.py remembers what a device wrote
    a client                        client.py (what can be called), migration_client.py; connection.py and pipelining.py (how),
                                    shared_memory.py (what the server may ask of it)

The source of all protocol facts is QEMU's docs/interop/vfio-user.rst (2025), and libvfio-user's behaviour where that is silent.
"""
