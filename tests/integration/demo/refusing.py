"""`python refusing.py WHAT -- COMMAND …`: run a command on a kernel that seems to lack something, by a seccomp filter.

    userfaultfd    the call is refused with EPERM, as where vm.unprivileged_userfaultfd or a container forbids it
    pagemap-scan   ioctl PAGEMAP_SCAN is answered with ENOTTY, as by kernels before 6.7 (Debian 12 has 6.1)

The real code meets a real refusal. The filter is inherited by every child; seccomp(2), linux/seccomp.h, linux/filter.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
PR_SET_NO_NEW_PRIVS = 38
LD_ABS, JEQ, RET = 0x20, 0x15, 0x06
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
NR, ARCH, ARG1 = 0, 4, 24  # offsets in struct seccomp_data; the low half of the second argument
PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg), linux/fs.h
#: AUDIT_ARCH_*, and the numbers of userfaultfd and ioctl.
MACHINES = {"x86_64": (0xC000003E, 323, 16), "aarch64": (0xC00000B7, 282, 29)}


def statement(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("HBBI", code, yes, no, value)


def program(what: str) -> list[bytes]:
    arch, userfaultfd, ioctl = MACHINES[os.uname().machine]
    start = [statement(LD_ABS, ARCH), statement(JEQ, arch, 1), statement(RET, ALLOW), statement(LD_ABS, NR)]
    if what == "userfaultfd":
        refused = [statement(JEQ, userfaultfd, 0, 1), statement(RET, ERRNO | errno.EPERM)]
    elif what == "pagemap-scan":
        refused = [
            statement(JEQ, ioctl, 0, 3),
            statement(LD_ABS, ARG1),
            statement(JEQ, PAGEMAP_SCAN, 0, 1),
            statement(RET, ERRNO | errno.ENOTTY),
        ]
    else:
        sys.exit(f"refusing.py: nothing is known of {what!r}")
    return [*start, *refused, statement(RET, ALLOW)]


class Fprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install(statements: list[bytes]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    filters = Fprog(len(statements), b"".join(statements))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filters), 0, 0
    ):
        sys.exit(f"refusing.py: no filter: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    what, dashes, *command = sys.argv[1:]
    assert dashes == "--"
    install(program(what))
    os.execv(command[0], command)
