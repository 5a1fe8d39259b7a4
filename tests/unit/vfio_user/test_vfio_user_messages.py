"""The payloads of vfio-user: what is written is read back, and what is wrong is refused with EINVAL."""

from __future__ import annotations

import errno
import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.protocols.vfio_user import messages as m
from devices.protocols.vfio_user import version as v
from devices.protocols.vfio_user.messages import RequestError

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
pages = st.integers(1, 2**20).map(lambda n: n * m.PAGE_SIZE)
addresses = st.integers(0, 2**40).map(lambda n: n * m.PAGE_SIZE)
text = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
capabilities = st.builds(
    lambda *fields: v.Capabilities(*fields, twin_fd_index=2 if fields[-1] else -1),
    *(u64, u64, u64, u64, st.booleans(), st.booleans()),
)
irq_sets = st.builds(
    lambda index, start, data: m.IrqSet(
        m.SetIrqs.DATA_BOOL | m.SetIrqs.TRIGGER, index, start, len(data), data
    ),
    u32,
    st.integers(0, m.MAX_IRQS),
    st.binary(min_size=1, max_size=64),
)
payloads = st.one_of(
    st.builds(v.Version, st.integers(0, 65535), st.integers(0, 65535), capabilities),
    st.builds(m.DmaMap, st.sampled_from([1, 2, 3]), addresses, addresses, pages),
    st.builds(m.DmaUnmap, st.just(0), addresses, pages),
    st.builds(m.DeviceInfo, u32, u32, u32),
    st.builds(m.RegionInfo, u32, u32, u32, u64, u64),
    st.builds(m.IrqInfo, u32, u32, u32),
    irq_sets,
)
kinds = (v.Version, m.DmaMap, m.DmaUnmap, m.DeviceInfo, m.RegionInfo, m.IrqInfo, m.IrqSet)


@given(payloads)
def test_a_payload_that_was_written_is_read_back(payload: Any) -> None:
    assert type(payload).decode(memoryview(payload.encode())) == payload


@given(st.sampled_from(kinds), st.binary(max_size=64))
def test_any_bytes_are_either_read_or_refused_with_einval(kind: Any, data: bytes) -> None:
    refusal = None
    try:
        kind.decode(memoryview(data))
    except RequestError as error:
        refusal = error.errno
    assert refusal in (None, errno.EINVAL)


@given(payloads, st.data())
def test_a_payload_of_another_length_is_refused(payload: Any, data: st.DataObject) -> None:
    encoded = payload.encode()
    wrong = data.draw(st.sampled_from([encoded[:-1], encoded + b"x"]))
    with pytest.raises(RequestError):
        type(payload).decode(memoryview(wrong))


@given(text)
def test_version_data_of_any_shape_is_read_or_refused_and_nothing_else(document: Any) -> None:
    payload = struct.pack("=HH", 0, 1) + json.dumps({"capabilities": document}).encode() + b"\0"
    try:
        version = v.Version.decode(payload)
    except RequestError:
        return
    assert all(type(a) is type(b) for a, b in zip(version.capabilities, v.Capabilities(), strict=True))


@pytest.mark.parametrize(
    "data",
    [
        b"{}",  # no NUL
        b"{}\0\0",
        b"\xff\0",
        b"[]\0",
        b"[" * 4000 + b"\0",  # deeper than Python's stack
        b'{"capabilities":{"max_msg_fds":true}}\0',
        b'{"capabilities":{"max_msg_fds":-1}}\0',
        b'{"capabilities":{"pgsizes":1e3}}\0',
        b'{"capabilities":{"write_multiple":1}}\0',
        b"{" + b" " * v.MAX_VERSION_DATA + b"}\0",
    ],
)
def test_version_data_that_makes_no_sense_is_refused(data: bytes) -> None:
    with pytest.raises(RequestError):
        v.Version.decode(struct.pack("=HH", 0, 1) + data)


def test_a_peer_that_says_nothing_has_the_defaults_and_an_unknown_capability_is_skipped() -> None:
    assert v.Version.decode(struct.pack("=HH", 0, 0)) == v.Version(
        0, 0, v.Capabilities(1, 1 << 20, 65535, 4096)
    )
    newer = b'{"capabilities":{"migration":{"pgsize":4096},"max_msg_fds":3}}\0'
    assert v.Version.decode(struct.pack("=HH", 0, 9) + newer).capabilities == v.Capabilities(max_msg_fds=3)


@pytest.mark.parametrize(
    "window",
    [
        m.DmaMap(3, 0, 0, 0),
        m.DmaMap(3, 0, 1, 4096),
        m.DmaMap(3, 0, 0, 4095),
        m.DmaMap(3, 1, 0, 4096),
        m.DmaMap(3, 0, 2**64 - 4096, 8192),
        m.DmaMap(3, 2**63 - 4096, 0, 8192),
        m.DmaMap(0, 0, 0, 4096),
        m.DmaUnmap(0, 4096, 0),
        m.DmaUnmap(0, 1, 4096),
        m.DmaUnmap(m.UNMAP_ALL, 0, 4096),
    ],
)
def test_a_dma_window_that_is_not_made_of_whole_pages_is_refused(window: Any) -> None:
    with pytest.raises(RequestError):
        type(window).decode(window.encode())


@pytest.mark.parametrize(
    "irqs",
    [
        m.IrqSet(0, 0, 0, 1),
        m.IrqSet(m.SetIrqs.TRIGGER, 0, 0, 1),
        m.IrqSet(m.SetIrqs.DATA_NONE, 0, 0, 1),
        m.IrqSet(m.SetIrqs.DATA_NONE | m.SetIrqs.DATA_BOOL | m.SetIrqs.TRIGGER, 0, 0, 1),
        m.IrqSet(m.SetIrqs.DATA_NONE | m.SetIrqs.MASK | m.SetIrqs.TRIGGER, 0, 0, 1),
        m.IrqSet(m.SetIrqs.DATA_NONE | m.SetIrqs.TRIGGER | 64, 0, 0, 1),
        m.IrqSet(m.SetIrqs.DATA_NONE | m.SetIrqs.MASK, 0, 0, 0),
        m.IrqSet(m.SetIrqs.DATA_EVENTFD | m.SetIrqs.TRIGGER, 0, 0, 0),
        m.IrqSet(m.SetIrqs.DATA_BOOL | m.SetIrqs.TRIGGER, 0, 0, 2, b"\1"),
        m.IrqSet(m.SetIrqs.DATA_NONE | m.SetIrqs.TRIGGER, 0, 0, m.MAX_IRQS + 1),
        m.IrqSet(m.SetIrqs.DATA_NONE | m.SetIrqs.TRIGGER, 0, 2**32 - 1, 1),
    ],
)
def test_a_set_irqs_that_is_not_one_action_on_one_kind_of_data_is_refused(irqs: m.IrqSet) -> None:
    with pytest.raises(RequestError):
        m.IrqSet.decode(irqs.encode())


def test_a_region_access_must_have_the_data_that_it_claims() -> None:
    assert m.decode_data(m.ACCESS.pack(8, 1, 3) + b"abc") == (8, 1, b"abc")
    for claimed in (2, 4, 2**32 - 1):
        with pytest.raises(RequestError):
            m.decode_data(m.ACCESS.pack(8, 1, claimed) + b"abc")
    with pytest.raises(RequestError):
        m.decode_read(m.ACCESS.pack(0, 0, m.MAX_DATA + 1))
