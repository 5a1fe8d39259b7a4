"""Runs that may be sent from the memfd that they lie in: the same bytes as from the mapping, and never past TLS."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Iterator

import pytest
from transport_rig import KINDS, Hosts, connected, in_thread, wait_until_blocked

from migrate.errors import ChannelClosed, TransportError
from migrate.memory import PAGE_SIZE, GuestAddress, GuestMemory, PageRuns, RegionSpec

every_kind = pytest.mark.parametrize("kind", KINDS)
PAGES = 4096
HIGH = GuestAddress(1 << 32)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory.create(
        [RegionSpec(GuestAddress(0), PAGES * PAGE_SIZE), RegionSpec(HIGH, PAGES * PAGE_SIZE)]
    )
    for region in memory.regions:
        region.view[:] = random.Random(region.gpa).randbytes(region.size)
    yield memory
    gc.collect()  # errors that were caught hold frames, and these hold views: mapped until the last is gone
    memory.close()


@every_kind
def test_what_is_sent_from_places_is_what_the_views_hold(
    kind: str, hosts: Hosts, memory: GuestMemory
) -> None:
    # the second run goes over the end of the first region
    runs = PageRuns([(3, 700), (PAGES - 5, 900), (2 * PAGES - 1, 1)])
    views = memory.views(runs)
    with connected(kind, hosts) as (ours, theirs):
        got = bytearray(runs.pages * PAGE_SIZE)
        arriving = in_thread(lambda: theirs.recv_into(memoryview(got)))
        ours.send_runs(views, memory.places(runs))
        arriving.result(30)
        assert got == b"".join(views)


def test_a_file_that_is_shorter_than_its_views_ends_the_channel_and_does_not_hang(
    hosts: Hosts, memory: GuestMemory
) -> None:
    region = memory.regions[0]
    with connected("unix", hosts) as (ours, _), pytest.raises(ChannelClosed, match="ends too early"):
        ours.send_runs([region.view[:8]], [(region.fd, region.size - 4)])


def everything(memory: GuestMemory) -> tuple[list[memoryview], list[tuple[int, int]]]:
    runs = PageRuns([(0, memory.page_count)])
    return memory.views(runs), memory.places(runs)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_no_progress_from_a_file_for_the_deadline_is_an_error(
    kind: str, hosts: Hosts, memory: GuestMemory
) -> None:
    with connected(kind, hosts) as (ours, _):
        ours.set_deadline(0.1)
        with pytest.raises(TransportError, match="moved no byte") as caught:
            ours.send_runs(*everything(memory))
        assert not isinstance(caught.value, ChannelClosed)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_abort_wakes_a_thread_that_is_blocked_sending_a_file(
    kind: str, hosts: Hosts, memory: GuestMemory
) -> None:
    raised: list[BaseException] = []
    with connected(kind, hosts) as (ours, _):

        def work() -> None:
            try:
                ours.send_runs(*everything(memory))
            except ChannelClosed as error:
                raised.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        wait_until_blocked(thread)
        ours.abort()
        thread.join(20)
        assert not thread.is_alive()
        assert "given up by this side" in str(raised[0])
