"""virtio devices: what a driver and a device say to each other in guest memory, and how a driver finds the device.

    ring.py     the split virtqueue; knows guest memory only through the protocol Memory
    runner.py   the thread of one virtqueue: takes requests, has them carried out, completes them; comes to rest
    blk.py      the block core: requests in, completions out. Knows no transport, no bus: any protocol may drive it
    backing.py  the raw image behind a block device, and its lock
    pci.py      the transport virtio-pci (modern); function.py and msix.py are the PCI in it

All facts are from the Virtual I/O Device specification, version 1.2 (OASIS, 2022); § is a section of it.
"""
