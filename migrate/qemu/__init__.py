"""QEMU as a peer: its migration stream, read and explained. What drives a QEMU comes here with the machines that are QEMUs."""
