"""What people read while a machine moves and when it has, to the letter."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from migrate.cli.check import Checklist
from migrate.cli.list import table
from migrate.cli.output import Output
from migrate.cli.report import Report, duration, size
from migrate.errors import IncompatibleError, Reason, UsageError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


ROUND = {
    "event": "round", "n": 3, "pages": 512, "bytes": 2 << 20, "seconds": 0.01, "dirty_rate": 8 << 20,
    "send_rate": 900 << 20, "remaining": 12 << 20, "expected_downtime_ms": 21.25,
}  # fmt: skip
LINE = "round 3  remaining 12.0 MiB  dirty 8.0 MiB/s, send 900.0 MiB/s  expected downtime 21.2 ms"
COMPLETED: dict[str, Any] = {
    "event": "outcome", "outcome": "completed", "running_on": "destination", "exit_code": 0, "reasons": [],
    "machine": "web1", "to": "tls://b:1", "ram_bytes": 256 << 20, "ram_bytes_sent": 300 << 20,
    "rounds": [{}, {}, {}], "downtime_ms": 14.24, "slowest_device": "rtc0",
    "downtime": {"stop": 1.0, "pages": 2.0, "save": 3.0, "send": 1.0, "load": 4.0, "commit": 2.0, "resume": 1.0, "network": 0.24},
    "verified": {"ram": True, "devices": True},
}  # fmt: skip


def shown(*events: dict[str, Any], err: io.StringIO | None = None, json: bool = False) -> tuple[str, str]:
    out, err = io.StringIO(), err or io.StringIO()
    report = Report(Output(out, err, json=json))
    for event in events:
        report.show(event)
    return out.getvalue(), err.getvalue()


def test_without_a_terminal_every_round_and_phase_is_a_line() -> None:
    events: list[dict[str, Any]] = [
        {"event": "phase", "phase": "pre-copy"},
        ROUND,
        {"event": "phase", "phase": "stop"},
    ]
    progress = {"event": "progress", "n": 4, "sent": 1, "remaining": 5}
    assert shown(*events, progress) == ("", f"phase: pre-copy\n{LINE}\nphase: stop\n")


def test_on_a_terminal_one_line_is_rewritten_and_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    progress = {"event": "progress", "n": 4, "sent": 1 << 20, "remaining": 3 << 20}
    _, err = shown(
        {"event": "phase", "phase": "pre-copy"},
        ROUND,
        progress,
        {**COMPLETED, "downtime_ms": None},
        err=Terminal(),
    )
    rewritten = err.split("\r\x1b[K")
    assert rewritten[1:3] == ["pre-copy …", LINE[:79]]
    assert rewritten[3] == LINE.replace("round 3  remaining 12.0", "round 4  remaining 3.0")[:79]
    assert rewritten[4].startswith("web1 runs at tls://b:1\n")


def test_limits_are_on_the_line_and_a_change_of_them_is_said() -> None:
    job = {"event": "job", "downtime_ms": 300, "bandwidth": 950 << 20}
    limits = {"event": "limits", "downtime_ms": 2000.0, "bandwidth": 0.0}
    limited = LINE.replace("send 900.0 MiB/s", "send 900.0 MiB/s (limit 950.0 MiB/s)") + " of 300"
    assert shown(job, ROUND, limits, ROUND)[1].splitlines() == [
        limited,
        "limits: downtime 2.00 s, no limit of bandwidth",
        f"{LINE} of 2000",
    ]


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "\r" not in shown(ROUND, err=Terminal())[1]


def test_a_migration_that_is_done_tells_downtime_and_its_parts() -> None:
    assert shown(COMPLETED)[1] == (
        "web1 runs at tls://b:1\n"
        "downtime 14.2 ms (stop 1.0, pages 2.0, save 3.0, send 1.0, load 4.0, commit 2.0, resume 1.0, network 0.2);"
        " slowest: rtc0\n"
        "sent 300.0 MiB of 256.0 MiB memory in 3 rounds\n"
        "verified: memory the same, devices the same\n"
    )


def test_a_refusal_tells_every_reason_and_that_nothing_was_stopped() -> None:
    reasons = [
        {"device": "uart0", "phase": "preflight", "reason": "reads version 1 only", "remedy": "update it"},
        {"device": "disp0", "phase": "preflight", "reason": "not offered", "remedy": ""},
    ]
    event = {"event": "outcome", "outcome": "refused", "exit_code": 3, "machine": "web1", "reasons": reasons}
    assert shown(event)[1] == (
        "ferry: uart0: reads version 1 only (update it)\nferry: disp0: not offered\n"
        "web1 was refused; nothing was stopped and it runs on here\n"
    )


@pytest.mark.parametrize(
    ("event", "last"),
    [
        ({"outcome": "aborted", "running_on": "source"}, "web1 runs on here"),
        ({"outcome": "aborted", "running_on": "neither"}, "web1 runs nowhere"),
        (
            {"outcome": "in_doubt", "running_on": "neither"},
            "web1 is stopped, both copies are intact, and this host goes on asking: `ferry recover web1`",
        ),
    ],
)
def test_every_other_end_says_where_the_machine_is(event: dict[str, Any], last: str) -> None:
    lines = shown({"event": "outcome", "machine": "web1", "reasons": [], **event})[1].splitlines()
    assert lines == ["ferry: it ended without a reason (look at the job's log in the host's directory)", last]


def test_with_json_stdout_has_the_events_as_they_came_and_stderr_the_complaints_alone() -> None:
    failed = {"event": "outcome", "outcome": "aborted", "reasons": [{"reason": "gone", "remedy": "look"}]}
    out, err = shown({"event": "phase", "phase": "stop"}, ROUND, failed, json=True)
    assert [json.loads(line) for line in out.splitlines()] == [
        {"event": "phase", "phase": "stop"},
        ROUND,
        failed,
    ]
    assert err == "ferry: gone (look)\n"


def test_a_failure_is_a_line_a_reason_and_an_exit_code() -> None:
    out, err = io.StringIO(), io.StringIO()
    refusal = IncompatibleError([Reason("a", "p", "no", "do"), Reason("b", "p", "nor", "")])
    assert Output(out, err, json=True).failure(refusal) == 3
    assert err.getvalue() == "ferry: a: no (do)\nferry: b: nor\n"
    assert json.loads(out.getvalue())["exit_code"] == 3
    assert Output(io.StringIO(), io.StringIO()).failure(UsageError("x")) == 2


def checked(*events: dict[str, Any]) -> list[str]:
    out = io.StringIO()
    machine = {
        "name": "web1",
        "regions": [{"size": 64 << 20}],
        "devices": [
            {"id": "uart0", "type": "uart16550", "version": 2},
            {"id": "old0", "type": "x", "version": 0},
        ],
    }
    checklist = Checklist(Output(out, io.StringIO()), machine, "tls://b:1")
    for event in events:
        checklist.show(event)
    return out.getvalue().splitlines()


def test_a_check_that_passes_lists_what_was_looked_at() -> None:
    warning = {"event": "warning", "warning": "old0: tracked by comparing all of memory"}
    assert checked(warning, {"event": "outcome", "outcome": "checked"}) == [
        "[ OK ] memory: 64.0 MiB",
        "[ OK ] uart0: uart16550 version 2",
        "[ OK ] old0: x",
        "[WARN] old0: tracked by comparing all of memory",
    ]


def test_a_check_that_fails_marks_what_is_against_it_and_only_that() -> None:
    against = [{"device": "uart0", "phase": "preflight", "reason": "too new", "remedy": "update"}]
    assert checked({"event": "outcome", "outcome": "refused", "reasons": against}) == [
        "[ OK ] memory: 64.0 MiB",
        "[ OK ] old0: x",
        "[FAIL] uart0: too new (update)",
    ]
    silent = [{"device": None, "phase": "preflight", "reason": "nobody listens there", "remedy": "start it"}]
    assert checked({"event": "outcome", "outcome": "aborted", "reasons": silent}) == [
        "[FAIL] nobody listens there (start it)"
    ]


def test_sizes_and_times_have_few_digits() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1536 << 10, 5 << 40)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 MiB", "5120.0 GiB",
    ]  # fmt: skip
    assert [duration(ms) for ms in (0.04, 14.24, 999.9, 2500)] == ["0.0 ms", "14.2 ms", "999.9 ms", "2.50 s"]


def test_a_table_is_as_wide_as_its_cells() -> None:
    assert table([("NAME", "X"), ("a", "long"), ("longer", "b")]) == [
        "NAME    X",
        "a       long",
        "longer  b",
    ]
