"""A device in a QEMU of the machine type `x-remote` (multi-process QEMU), as a participant like any other.

The bridge starts that QEMU, is the one client of its device (MPQemuMsg) and of its monitor (QMP), and serves the VMM by vfio-user.
Guest memory is a descriptor that passes through it; an access to a register costs one hop more, and so does an interrupt.

command.py    QEMU's command line
requests.py   how many SCSI requests are under way, told by QEMU's trace
remote.py     QEMU's process: run, stopped, saved, loaded, ended
function.py   the PCI function: its BARs and configuration space as the guest sees them
interrupt.py  from QEMU's eventfd to the VMM's
wiring.py     memory and interrupt, told to whichever QEMU there is
front.py      what the VMM asks
data.py       QEMU's stream as streamed state
bridge.py     the participant
"""
