"""The embedded machine's processor, a process of its own: Unicorn executes a small x86-64 guest out of shared memory.

__main__.py       the process
vcpu.py           the vCPU as a participant: its state, coming to rest and back
engine.py         Unicorn; the only file that imports it (GPL-2.0, an optional extra, in this process alone)
runner.py         the thread that executes, and how it is made to rest
platform_page.py  registers that the vCPU answers itself: interrupts, idle, power-off
windows.py        the devices' registers, by vfio-user
tlb_log.py        the dirty tracker `log` of what the guest writes
platform_file.py  what the supervisor says about the machine
boot.py           what the guest finds in its memory at a cold start
guest/            the guest: source, and the binary made from it
"""
