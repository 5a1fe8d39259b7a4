"""QEMU as the vCPU of a machine: one process that owns QEMU and its monitor, and is a participant like any other.

monitor.py   QMP on a thread of its own, with deadlines, for callers that are no coroutines
command.py   the command line: what machine.toml says, and our sockets
process.py   QEMU's process: started, watched, ended
vmm.py       the participant: what stopping, resuming, cancelling are for QEMU
facts.py     what the two sides must agree on
"""
