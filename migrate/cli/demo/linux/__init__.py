"""A Linux guest for QEMU that checks itself: Debian's kernel, and one program of ours as its first process.

init.c, init     that program, built by the Makefile beside it; what it prints is at its head
initramfs.py     kernel found, archive made: the program and the kernel's virtio modules
image.py         its disk, checked from outside
"""
