"""What a job's events come to. Events are a coordinator's words: whatever they are, the bus can carry what is shown of them."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from migrate.bus import library
from migrate.bus.status import JobStatus, properties
from migrate.host.progress import Progress

KINDS = ("job", "limits", "phase", "progress", "round", "held", "in_doubt", "outcome")
FIELDS = (
    "at", "downtime_ms", "bandwidth", "phase", "n", "remaining", "sent", "bytes", "dirty_rate", "send_rate",
    "expected_downtime_ms", "outcome", "running_on", "exit_code", "ram_bytes_sent", "reasons",
)  # fmt: skip
TEXT = st.text(st.characters(), max_size=5)  # with NUL and lone surrogates
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(("device", "reason")), inner),
    max_leaves=4,
)
EVENTS = st.builds(
    lambda kind, rest: {**rest, "event": kind},
    st.sampled_from(KINDS) | JSON,
    st.dictionaries(st.sampled_from(FIELDS), JSON),
)


@given(st.lists(EVENTS, max_size=4))
def test_whatever_a_coordinator_says_can_be_shown_on_the_bus(events: list[dict[str, Any]]) -> None:
    progress = Progress(JobStatus("ab" * 16, "web1", "migrate", "unix:/x"))
    sent = 0
    for event in events:
        progress.take(event)
        if event["event"] != "outcome":
            assert progress.status.sent_bytes >= sent, "it runs backwards"
        sent = progress.status.sent_bytes
    for item in properties(JobStatus, lambda: progress.status):
        library.encode_body("v", [library.variant(item.signature, item.getter())])


def test_what_rounds_have_sent_adds_up() -> None:
    progress = Progress(JobStatus())
    assert not progress.take({"event": "progress", "n": 1, "sent": 60, "remaining": 40})
    progress.take({"event": "round", "n": 1, "bytes": 100, "remaining": 30})
    progress.take({"event": "progress", "n": 2, "sent": 10, "remaining": 20})
    assert (progress.status.round, progress.status.sent_bytes, progress.status.remaining_bytes) == (
        2,
        110,
        20,
    )
    assert progress.take({"event": "held", "at": "round:2"})
    progress.take({"event": "limits", "bandwidth": 7, "downtime_ms": 9})
    assert (progress.status.state, progress.status.bandwidth) == ("held", 7)
    progress.take({"event": "phase", "phase": "stop"})
    assert (progress.status.state, progress.status.phase) == ("running", "stop")
