"""Processes that show org.vmferry.Device1 on the bus for what cannot: QEMU itself, and servers that speak vfio-user only."""
