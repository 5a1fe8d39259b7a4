"""What the test kit makes of a schema: valid states fit, and every invalid one is refused, by its path or its bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import BlobError
from migrate.state import catalog
from migrate.testing.strategies import invalid_payloads, invalid_states, valid_states

VERSIONS = [
    catalog.load(name).at(number)
    for name in ("uart16550", "rtc", "vcpu")
    for number in catalog.load(name).versions
]


@given(data=st.data())
def test_a_valid_state_fits(data: st.DataObject) -> None:
    version = data.draw(st.sampled_from(VERSIONS))
    state = data.draw(valid_states(version))
    assert version.decode(version.encode(state)) == state


@given(data=st.data())
def test_an_invalid_state_is_refused_at_its_place(data: st.DataObject) -> None:
    version = data.draw(st.sampled_from(VERSIONS))
    path, state = data.draw(invalid_states(version))
    with pytest.raises(BlobError) as caught:
        version.encode(state)
    assert caught.value.reason.startswith(path.split("[")[0])


@given(data=st.data())
def test_invalid_bytes_are_refused_whatever_is_wrong_with_them(data: st.DataObject) -> None:
    version = data.draw(st.sampled_from(VERSIONS))
    what, payload = data.draw(invalid_payloads(version))
    with pytest.raises(BlobError):
        version.decode(payload)
    assert what
