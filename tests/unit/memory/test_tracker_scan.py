"""What the kernel does and does not see (reference/device-protocols.md §7), and what we make of what it refuses."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest
from two_regions import HIGH
from writer import Writer

from migrate.errors import TrackerError
from migrate.memory import PAGE_SIZE, GuestAddress, GuestMemory, PageRuns, ScanTracker, prove, scan, syscalls

try:
    prove.prove("scan")
except TrackerError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture
def writer(memory: GuestMemory) -> Iterator[Writer]:
    tracker = ScanTracker()
    tracker.attach(memory)
    tracker.start()
    yield Writer(memory, tracker)
    tracker.close()


def test_a_range_that_is_not_registered_is_an_error_not_a_clean_page(writer: Writer) -> None:
    region = writer.memory.regions[1]
    half = struct.pack("=2Q", region.address + 8 * PAGE_SIZE, 8 * PAGE_SIZE)
    fcntl.ioctl(writer.tracker._uffd, scan._UFFDIO_UNREGISTER, half)  # type: ignore[attr-defined]
    with pytest.raises(TrackerError, match="not write-protected"):
        writer.dirty()


def test_guest_memory_that_was_mapped_anew_at_its_place_is_an_error(writer: Writer) -> None:
    region = writer.memory.regions[1]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    map_fixed = 0x10
    flags = mmap.MAP_SHARED | map_fixed
    assert (
        libc.mmap(region.address, region.size, mmap.PROT_READ | mmap.PROT_WRITE, flags, region.fd, 0)
        == region.address
    )
    region.view[0] = 1
    with pytest.raises(TrackerError, match="not write-protected"):
        writer.dirty()


def test_one_mapping_has_one_tracker(writer: Writer) -> None:
    second = ScanTracker()
    second.attach(writer.memory)
    with pytest.raises(TrackerError, match="no two trackers"):
        second.start()
    second.close()
    # The one that failed has not disarmed the one that works.
    writer.fill(3, 1)
    assert writer.dirty_pages() == [3]


def test_another_mapping_and_pwrite_are_not_seen_unless_they_are_marked(writer: Writer) -> None:
    region = writer.memory.regions[0]
    other = GuestMemory()
    other.attach(GuestAddress(0), region.size, region.fd)
    other.regions[0].pages[4] = 1
    os.pwrite(region.fd, b"x", 9 * PAGE_SIZE)
    assert writer.dirty_pages() == []
    writer.tracker.mark(GuestAddress(9 * PAGE_SIZE), 1)
    assert writer.dirty_pages() == [9]
    other.close()


def test_write_protection_outlives_the_kernel_forgetting_the_page_tables(writer: Writer) -> None:
    region = writer.memory.regions[1]
    for page in range(21, 64):
        writer.fill(page, 1)
    assert len(writer.dirty_pages()) == 43
    for advice in (mmap.MADV_DONTNEED, 20, 21):  # MADV_COLD, MADV_PAGEOUT
        syscalls.madvise(region.address, region.size, advice)
        assert writer.dirty_pages() == []
        writer.store(30, b"y")
        assert writer.dirty_pages() == [30]


@pytest.mark.parametrize("collect_between", [True, False])
def test_a_hole_that_somebody_else_punched_does_not_hide_our_next_write(
    writer: Writer, collect_between: bool
) -> None:
    region = writer.memory.regions[1]
    writer.fill(25, 1)
    assert writer.dirty_pages() == [25]
    syscalls.punch_hole(region.fd, 4 * PAGE_SIZE, PAGE_SIZE)
    if collect_between:
        writer.dirty()
    writer.store(25, b"y")
    assert writer.dirty_pages() == [25]


def test_after_stop_the_mapping_can_be_tracked_again_even_if_a_forked_child_lives(writer: Writer) -> None:
    """The child has the userfaultfd too, so closing ours does not end its hold on the mapping."""
    hold, release = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(release)
        os.read(hold, 1)
        os._exit(0)
    os.close(hold)
    try:
        writer.tracker.stop()
        writer.tracker.start()
        writer.fill(2, 2)
        assert writer.dirty_pages() == [2]
    finally:
        os.close(release)
        os.waitpid(child, 0)


def test_prefault_counts_as_a_write(writer: Writer) -> None:
    """Why memory is prefaulted before a tracker starts."""
    writer.memory.prefault(PageRuns([(40, 2)]), lambda: False)
    assert writer.dirty_pages() == [40, 41]


def test_a_user_without_any_privilege_may_use_it() -> None:
    code = """
import ctypes, os
from migrate.memory import prove
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, which exec would have done
with open("/proc/self/status") as status:
    assert "CapEff:\\t0000000000000000" in status.read()
prove.prove("scan")
print("works")
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.stdout == "works\n", run.stderr


def test_a_process_that_may_not_use_userfaultfd_is_told_to_use_the_log() -> None:
    """With the system call forbidden by seccomp, as Docker's default profile does."""
    code = """
import ctypes, struct
from migrate.errors import TrackerError
from migrate.memory import prove
# BPF: load the number; if it is userfaultfd (323 on x86-64, 282 on the others) answer EPERM, else allow.
rules = [(0x20, 0, 0, 0), (0x15, 1, 0, 323), (0x15, 0, 1, 282), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7fff0000)]
program = b"".join(struct.pack("HBBI", *rule) for rule in rules)
buffer = ctypes.create_string_buffer(program)
filters = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rules), ctypes.addressof(buffer)))
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.addressof(filters), 0, 0) == 0
print(prove.choose(None))
try:
    prove.choose("scan")
except TrackerError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.stdout.splitlines()[:1] == ["log"], run.stderr
    assert "may not use userfaultfd" in run.stdout
    assert "use the tracker log" in run.stdout


def test_the_second_regions_addresses_are_its_own(writer: Writer) -> None:
    writer.memory.find(GuestAddress(HIGH + 5 * PAGE_SIZE), 1)[:] = b"z"
    assert writer.dirty_pages() == [26]
