"""The log of DMA is exact to the bit, also where the page of a report is not the page of the log."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.protocols.vfio_user.dma_log import MAX_PAGE, MIN_PAGE, DmaLog, choose_page_size
from devices.protocols.vfio_user.feature_messages import LoggingReport

K = 1 << 10


def bits(bitmap: bytes) -> set[int]:
    return {at for at in range(8 * len(bitmap)) if bitmap[at >> 3] >> (at & 7) & 1}


def expected(writes: list[tuple[int, int]], log_page: int, report: LoggingReport) -> set[int]:
    """By the definition, byte by byte of the pages: no arithmetic of the log's own."""
    end = report.iova + report.length
    found = set()
    for address, length in writes:
        for page in range(address // log_page, (address + length - 1) // log_page + 1):
            low, high = max(page * log_page, report.iova), min((page + 1) * log_page, end)
            for at in range(low, high, min(log_page, report.page_size)):
                found.add((at - report.iova) // report.page_size)
            if low < high:
                found.add((high - 1 - report.iova) // report.page_size)
    return found


@given(
    st.lists(st.tuples(st.integers(0, 600 * K), st.integers(1, 40 * K)), max_size=8),
    st.sampled_from([4 * K, 8 * K, 64 * K]),
    st.sampled_from([1 * K, 2 * K, 4 * K, 8 * K, 16 * K, 128 * K]),
    st.integers(0, 64),
    st.integers(32, 100),
)
def test_every_bit_of_a_report_is_what_the_definition_says(
    writes: list[tuple[int, int]], log_page: int, page_size: int, first: int, pages: int
) -> None:
    log = DmaLog(log_page)
    for write in writes:
        log.mark(*write)
    report = LoggingReport(first * 4 * K, max(pages * 4 * K, page_size), page_size)
    bitmap = log.report(report)
    assert len(bitmap) == report.bitmap_size
    assert len(bitmap) % 8 == 0
    assert bits(bitmap) == expected(writes, log_page, report)


def test_bit_i_is_page_i_least_significant_first() -> None:
    log = DmaLog(4 * K)
    for page in (0, 9, 17, 63, 64):
        log.mark(0x100000 + page * 4 * K, 1)
    assert log.report(LoggingReport(0x100000, 65 * 4 * K, 4 * K)) == bytes(
        [0x01, 0x02, 0x02, 0, 0, 0, 0, 0x80, 0x01, 0, 0, 0, 0, 0, 0, 0]
    )


def test_a_half_page_repeats_each_bit_and_a_double_page_ors_two() -> None:
    for page_size, shown in ((2 * K, {2, 3, 10, 11}), (4 * K, {1, 5}), (8 * K, {0, 2}), (64 * K, {0})):
        log = DmaLog(4 * K)
        log.mark(4 * K, 1)
        log.mark(20 * K, 4 * K)
        assert bits(log.report(LoggingReport(0, 64 * K, page_size))) == shown


def test_a_report_forgets_what_it_reports_and_only_that() -> None:
    log = DmaLog(4 * K)
    log.mark(0, 12 * K)
    assert bits(log.report(LoggingReport(4 * K, 4 * K, 4 * K))) == {0}
    assert bits(log.report(LoggingReport(0, 16 * K, 4 * K))) == {0, 2}
    assert bits(log.report(LoggingReport(0, 16 * K, 4 * K))) == set()


def test_a_page_of_which_only_a_part_was_asked_for_is_reported_again() -> None:
    log = DmaLog(64 * K)
    log.mark(60 * K, 1)
    assert bits(log.report(LoggingReport(0, 32 * K, 4 * K))) == set(range(8))
    assert bits(log.report(LoggingReport(32 * K, 32 * K, 4 * K))) == set(range(8))
    assert bits(log.report(LoggingReport(0, 64 * K, 64 * K))) == {0}
    assert bits(log.report(LoggingReport(0, 64 * K, 64 * K))) == set()


def test_negative_control_what_was_not_written_is_not_reported() -> None:
    log = DmaLog(4 * K)
    log.mark(8 * K, 0)
    log.mark(1 << 40, 4 * K)
    assert log.report(LoggingReport(0, 1 << 30, 4 * K)) == bytes(32 * K)
    assert bits(log.report(LoggingReport(1 << 40, 4 * K, 4 * K))) == {0}


def test_addresses_up_to_the_last_page_and_the_largest_pages_fit() -> None:
    top = (1 << 64) - 4 * K
    log = DmaLog(4 * K)
    log.mark(top, 4 * K)
    assert bits(log.report(LoggingReport(top, 4 * K, 4 * K))) == {0}
    log.mark(top, 4 * K)
    half = LoggingReport(1 << 63, 1 << 60, 1 << 38)
    assert bits(log.report(half)) == set()
    assert bits(log.report(LoggingReport((1 << 64) - (1 << 60), 1 << 60, 1 << 38))) == {(1 << 22) - 1}


def test_what_is_forgotten_is_gone_and_costs_nothing() -> None:
    log = DmaLog(4 * K)
    log.mark(0, 4 << 30)
    log.forget(0, 4 << 30)
    assert not log._pieces
    log.mark(1 << 50, 1)
    assert len(log._pieces) == 1


@pytest.mark.parametrize("wish", [0, 1, 2 * K, 3 * 4 * K, MAX_PAGE * 2, (1 << 64) - 1])
def test_a_wish_that_cannot_be_granted_gives_the_finest_page(wish: int) -> None:
    assert choose_page_size(wish) == MIN_PAGE


@pytest.mark.parametrize("wish", [4 * K, 8 * K, 2 << 20, MAX_PAGE])
def test_a_wish_that_can_be_granted_is(wish: int) -> None:
    assert choose_page_size(wish) == wish
