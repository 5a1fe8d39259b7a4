"""display: drawing against a model, VRAM through its stream, and the fence in tracked guest memory."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from passage import Edges, carry, payload_of

from devices.display import CHECKSUM, COMMAND, COPY, FILL, STATUS, Display
from migrate.errors import DeviceRefused, UsageError
from migrate.memory.bitmap import DirtyBitmap
from migrate.memory.log import LogTracker
from migrate.memory.memfd import create_memfd

WIDTH, HEIGHT, STRIDE, X, Y, W, H = 0x08, 0x0C, 0x10, 0x18, 0x1C, 0x20, 0x24
SRC_X, SRC_Y, COLOUR = 0x28, 0x2C, 0x30
FRAMES, FENCE_GPA, FENCE_VALUE, SUM = 0x40, 0x48, 0x50, 0x58
DONE, REFUSED = 1, 2
RAM = 64 << 12


@pytest.fixture
def display() -> Iterator[Display]:
    """1 MiB of VRAM as 256 lines of 4096 bytes, and 64 pages of guest RAM at 0."""
    device = make()
    yield device
    unmake(device)


def make(vram: str = "1M") -> Display:
    device = Display("display0", {"vram": vram})
    fd = create_memfd("ram", RAM)
    device.memory.attach(0, RAM, fd, 0)
    os.close(fd)
    tracker = LogTracker()
    tracker.attach(device.memory.attached)
    tracker.start()
    device.memory.tracker = tracker
    put(device, HEIGHT, 256)
    return device


def unmake(device: Display) -> None:
    assert device.memory.tracker is not None
    device.memory.tracker.close()
    device.memory.attached.close()
    device.vram.close()


def dirty_ram(device: Display) -> list[int]:
    """Pages of guest RAM marked since the last call."""
    assert device.memory.tracker is not None
    bitmap = DirtyBitmap(RAM >> 12)
    device.memory.tracker.collect(bitmap)
    return [int(page) for page in bitmap.pages_array()]


def get(device: Display, offset: int, size: int = 4) -> int:
    with device.lock:
        return device.read(0, offset, size)


def put(device: Display, offset: int, value: int, size: int = 4) -> None:
    with device.lock:
        device.write(0, offset, size, value)


def command(device: Display, number: int, x: int, y: int, w: int, h: int, **registers: int) -> int:
    """Carry one out; its STATUS, acknowledged."""
    for offset, value in ((X, x), (Y, y), (W, w), (H, h)):
        put(device, offset, value)
    for name, value in registers.items():
        put(device, {"colour": COLOUR, "src_x": SRC_X, "src_y": SRC_Y}[name], value)
    put(device, COMMAND, number)
    status = get(device, STATUS)
    put(device, STATUS, status)
    return status


def fill(device: Display, x: int, y: int, w: int, h: int, colour: int) -> int:
    return command(device, FILL, x, y, w, h, colour=colour)


def checksum(device: Display, x: int, y: int, w: int, h: int) -> int:
    assert command(device, CHECKSUM, x, y, w, h) == DONE
    return get(device, SUM, 8)


def stream(source: Display, destination: Display) -> int:
    """Everything that is to be sent right now; how many pages went."""
    pages = 0
    while True:
        chunk, _ = source.vram.read_chunk(1 << 20)
        if not chunk:
            return pages
        runs = np.frombuffer(chunk, "<u4", 4 * int.from_bytes(chunk[8:12], "little"), 32)
        pages += int(runs[2::4].sum())
        destination.vram.write_chunk(chunk)


# -- registers ----------------------------------------------------------------------------------------------------------------


def test_after_a_reset_it_is_a_blank_frame_of_1024_by_768(display: Display) -> None:
    fill(display, 0, 0, 1024, 256, 7)
    put(display, FENCE_GPA, 8, 8)
    display.reset()
    assert [get(display, offset) for offset in (WIDTH, HEIGHT, STRIDE)] == [1024, 768, 4096]
    assert [get(display, offset, 8) for offset in (FRAMES, FENCE_GPA)] == [0, 0]
    assert not any(display.vram.view)


def test_eight_byte_registers_are_read_and_written_whole_or_by_halves(display: Display) -> None:
    put(display, FENCE_VALUE, 0x1111_2222_3333_4444, 8)
    put(display, FENCE_VALUE, 0xAAAA_BBBB)
    put(display, FENCE_VALUE + 4, 0xCCCC_DDDD)
    assert get(display, FENCE_VALUE, 8) == 0xCCCC_DDDD_AAAA_BBBB
    assert (get(display, FENCE_VALUE), get(display, FENCE_VALUE + 4)) == (0xAAAA_BBBB, 0xCCCC_DDDD)


def test_read_only_registers_and_accesses_of_other_widths_keep_everything(display: Display) -> None:
    before = display.save()
    for offset, size in ((0x00, 8), (FRAMES, 8), (SUM, 4), (0x14, 4), (WIDTH, 8), (X, 2)):
        put(display, offset, 3, size)
    assert display.save() == before
    assert get(display, WIDTH, 8) == 0
    assert get(display, 0x00, 8) == 1 << 20


# -- commands -------------------------------------------------------------------------------------------------------------------


def test_a_fill_sets_its_rectangle_and_nothing_else(display: Display) -> None:
    assert fill(display, 10, 20, 30, 40, 0xFF00FF00) == DONE
    frame = np.frombuffer(display.vram.view, "<u4").reshape(256, 1024)
    assert (frame[20:60, 10:40] == 0xFF00FF00).all()
    assert np.count_nonzero(frame) == 30 * 40
    del frame


def test_a_copy_onto_itself_scrolls(display: Display) -> None:
    for line in range(8):
        fill(display, 0, line, 1024, 1, line + 1)
    assert command(display, COPY, 0, 0, 1024, 7, src_x=0, src_y=1) == DONE
    assert [checksum(display, 0, line, 1, 1) for line in range(8)] == [2, 3, 4, 5, 6, 7, 8, 8]
    assert command(display, COPY, 0, 1, 1024, 7, src_x=0, src_y=0) == DONE
    assert [checksum(display, 0, line, 1, 1) for line in range(8)] == [2, 2, 3, 4, 5, 6, 7, 8]


def test_a_checksum_is_the_sum_of_the_pixels_as_64_bits(display: Display) -> None:
    fill(display, 0, 0, 1024, 256, 0xFFFF_FFFF)
    fill(display, 3, 3, 1, 1, 5)
    assert checksum(display, 0, 0, 1024, 256) == 0xFFFF_FFFF * (1024 * 256 - 1) + 5


def test_frames_count_fills_and_copies_but_not_checksums_nor_refusals(display: Display) -> None:
    fill(display, 0, 0, 1, 1, 1)
    command(display, COPY, 1, 1, 1, 1)
    fill(display, 0, 0, 0, 5, 1)
    checksum(display, 0, 0, 1, 1)
    fill(display, 1024, 0, 1, 1, 1)
    assert get(display, FRAMES, 8) == 3


@pytest.mark.parametrize(
    "registers",
    [
        {X: 1024, W: 1, H: 1},
        {Y: 255, W: 1, H: 2},
        {W: 1025, H: 1},
        {W: 1, H: 1, HEIGHT: 257},
        {W: 1, H: 1, STRIDE: 4092},
        {W: 1, H: 1, STRIDE: 0},
        {W: 1, H: 1, STRIDE: 0xFFFF_FFFC},
        {W: 1, H: 1, COMMAND: 0},
        {W: 1, H: 1, COMMAND: 99},
        {W: 2, H: 1, SRC_X: 1023, COMMAND: COPY},
        {W: 1, H: 1, FENCE_GPA: 12},
        {W: 1, H: 1, FENCE_GPA: RAM},
        {W: 1, H: 1, FENCE_GPA: RAM - 4},
    ],
)
def test_a_command_that_makes_no_sense_is_refused_with_an_interrupt(
    display: Display, registers: dict[int, int]
) -> None:
    edges = Edges(display)
    before = bytes(display.vram.view)
    for offset, value in registers.items():
        if offset != COMMAND:
            put(display, offset, value)
    put(display, COMMAND, registers.get(COMMAND, FILL))
    assert get(display, STATUS) == REFUSED
    assert edges.take() == 1
    assert dirty_ram(display) == []
    assert bytes(display.vram.view) == before
    put(display, STATUS, REFUSED)
    assert get(display, STATUS) == 0
    edges.close()


def test_a_command_stores_its_fence_in_tracked_memory_before_it_interrupts(
    display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(display, FENCE_GPA, 0x5008, 8)
    put(display, FENCE_VALUE, 0x1122_3344_5566_7788, 8)
    seen: list[object] = []
    monkeypatch.setattr(
        type(display.irq()),
        "raise_",
        lambda _: seen.append((display.memory.read(0x5008, 8), dirty_ram(display))),
    )
    assert fill(display, 0, 0, 1, 1, 1) == DONE
    assert seen == [(0x1122_3344_5566_7788.to_bytes(8, "little"), [5])]


# -- state ----------------------------------------------------------------------------------------------------------------------


def test_vram_arrives_page_for_page_and_later_fills_send_only_what_they_touched(display: Display) -> None:
    destination = make()
    fill(display, 0, 10, 1024, 20, 9)
    display.vram.begin()
    assert stream(display, destination) == 20
    assert stream(display, destination) == 0
    fill(display, 100, 50, 1, 3, 8)
    command(display, COPY, 0, 200, 10, 1, src_x=0, src_y=10)
    assert stream(display, destination) == 4
    display.vram.end()
    carry(payload_of(display), destination)
    assert checksum(destination, 0, 0, 1024, 256) == checksum(display, 0, 0, 1024, 256)
    assert bytes(destination.vram.view) == bytes(display.vram.view)
    unmake(destination)


def test_a_narrow_fill_in_a_wide_frame_marks_only_the_pages_of_its_own_columns(display: Display) -> None:
    destination = make()
    put(display, STRIDE, 4 * 4096)
    put(display, WIDTH, 4096)
    put(display, HEIGHT, 64)
    display.vram.begin()
    fill(display, 1024, 0, 1, 64, 5)
    assert stream(display, destination) == 64
    fill(display, 1023, 0, 2, 64, 6)
    assert stream(display, destination) == 128
    assert bytes(destination.vram.view) == bytes(display.vram.view)
    display.vram.end()
    unmake(destination)


@pytest.mark.parametrize(
    ("wrong", "words"), [({"vram_bytes": 4096}, "4096 bytes of VRAM"), ({"stride": 4098}, "stride of 4098")]
)
def test_a_state_for_another_display_is_refused(
    display: Display, wrong: dict[str, object], words: str
) -> None:
    with pytest.raises(DeviceRefused, match=words) as caught:
        display.check(display.save() | wrong)
    assert caught.value.remedy
    assert caught.value.device == "display0"


@pytest.mark.parametrize("size", ["0", "65M", "4097", "-1M", "1G", "", "١M", "99999999999999999999"])
def test_a_size_of_vram_that_cannot_be_is_refused(size: str) -> None:
    with pytest.raises(UsageError, match="vram="):
        Display("display0", {"vram": size})


# -- properties -----------------------------------------------------------------------------------------------------------------

SMALL = st.integers(0, 20)
DRAWING = st.tuples(
    st.sampled_from([FILL, COPY, CHECKSUM]),
    SMALL,
    SMALL,
    SMALL,
    SMALL,
    SMALL,
    SMALL,
    st.integers(0, 2**32 - 1),
)


@given(drawings=st.lists(DRAWING, max_size=30))
def test_drawing_agrees_with_a_frame_of_plain_lists(drawings: list[tuple[int, ...]]) -> None:
    device = make("4K")
    for offset, value in ((WIDTH, 16), (HEIGHT, 12), (STRIDE, 80)):
        put(device, offset, value)
    model = [[0] * 16 for _ in range(12)]
    for number, x, y, w, h, src_x, src_y, colour in drawings:
        status = command(device, number, x, y, w, h, src_x=src_x, src_y=src_y, colour=colour)
        fits = x + w <= 16 and y + h <= 12
        if number == COPY:
            fits = fits and src_x + w <= 16 and src_y + h <= 12
        assert status == (DONE if fits else REFUSED)
        if not fits:
            continue
        cells = [(row, column) for row in range(h) for column in range(w)]
        if number == CHECKSUM:
            assert get(device, SUM, 8) == sum(model[y + row][x + column] for row, column in cells)
        else:
            old = [list(row) for row in model]
            for row, column in cells:
                model[y + row][x + column] = colour if number == FILL else old[src_y + row][src_x + column]
    frame = np.ndarray((12, 16), "<u4", device.vram.view, 0, (80, 4)).tolist()
    assert frame == model
    unmake(device)


OFFSETS = [*range(0, 0x60, 4)]
ACCESS = st.one_of(
    st.tuples(st.just("read"), st.sampled_from(OFFSETS), st.sampled_from([1, 4, 8]), st.just(0)),
    st.tuples(
        st.just("write"),
        st.sampled_from(OFFSETS),
        st.sampled_from([4, 8]),
        st.one_of(st.integers(0, 20), st.integers(0, 2**64 - 1)),
    ),
    st.tuples(st.just("write"), st.just(COMMAND), st.just(4), st.integers(1, 3)),
    st.tuples(st.just("write"), st.sampled_from([W, H]), st.just(4), st.integers(1, 60)),
)


def answers(
    device: Display, edges: Edges, accesses: list[tuple[str, int, int, int]]
) -> list[tuple[int, int]]:
    seen = []
    for kind, offset, size, value in accesses:
        offset -= offset % size
        answer = 0
        if kind == "read":
            answer = get(device, offset, size)
        else:
            put(device, offset, value & (1 << 8 * size) - 1, size)
        seen.append((answer, edges.take()))
    return seen


@given(
    before=st.lists(ACCESS, max_size=40),
    live=st.lists(ACCESS, max_size=40),
    after=st.lists(ACCESS, max_size=40),
)
def test_after_any_accesses_a_device_that_loads_the_state_answers_the_rest_as_this_one(
    before: list[tuple[str, int, int, int]],
    live: list[tuple[str, int, int, int]],
    after: list[tuple[str, int, int, int]],
) -> None:
    """VRAM goes as in a migration: a first pass while the guest draws, the rest when it has stopped."""
    source, destination = make("64K"), make("64K")
    listeners = [Edges(source), Edges(destination)]
    for offset, value in ((WIDTH, 64), (HEIGHT, 64), (STRIDE, 256)):
        put(source, offset, value)
    try:
        answers(source, listeners[0], before)
        source.vram.begin()
        stream(source, destination)
        answers(source, listeners[0], live)
        stream(source, destination)
        source.vram.end()
        payload = payload_of(source)
        carry(payload, destination)
        assert payload_of(destination) == payload
        assert bytes(source.vram.view) == bytes(destination.vram.view)
        assert answers(source, listeners[0], after) == answers(destination, listeners[1], after)
        assert payload_of(source) == payload_of(destination)
        assert bytes(source.vram.view) == bytes(destination.vram.view)
    finally:
        for device, edges in zip((source, destination), listeners, strict=True):
            device.irq().connect(None)
            edges.close()
            unmake(device)
