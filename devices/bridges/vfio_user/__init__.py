"""A device whose server speaks vfio-user only, as a participant like any other: one process between its VMM and the server.

The bridge is the server's one client, and serves the VMM on a socket of its own. Guest memory and interrupts are descriptors that
pass through it, so the device reaches both without it; an access to a register costs one hop more.

upstream.py    the connection to the server: its states, its errors by name, its end
passing.py     what the VMM asks, asked of the server
data.py        MIG_DATA as streamed state
dma_log.py     DMA logging as a dirty tracker
server.py      the server's process, where the bridge starts it
bridge.py      the participant
"""
