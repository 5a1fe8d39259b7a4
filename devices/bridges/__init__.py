"""Processes that show org.vmferry.Device1 on the bus for something that cannot: QEMU itself, and servers that speak vfio-user only."""
