"""`make bench` works and says what it found; its figures are nobody's business here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.bench", *words],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_every_quick_figure_is_one_well_formed_line() -> None:
    done = bench("precopy", "touch", "collect", "base", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    machine, *figures = [json.loads(line) for line in done.stdout.splitlines()]
    assert machine["event"] == "machine"
    assert machine["cores"] >= 1
    cases = [(figure["bench"], figure["case"]) for figure in figures]
    assert len(set(cases)) == len(cases)
    for transport in ("unix", "tcp", "tls"):
        for connections in ("1 connection", "2 connections", "4 connections"):
            assert ("precopy", f"{transport}, {connections}") in cases
    for figure in figures:
        assert figure["event"] == "figure"
        if figure["value"] is None:
            assert figure["note"], "what cannot be measured here says why"
            continue
        assert figure["value"]["low"] <= figure["value"]["median"] <= figure["value"]["high"]
        assert figure["value"]["low"] > 0
    assert all(
        figure["ratio"]["median"] > 0 and figure["raw"]["median"] > 0
        for figure in figures
        if figure["bench"] == "precopy"
    )


def test_a_person_gets_a_table() -> None:
    done = bench("touch", "--quick")
    assert done.returncode == 0, done.stderr
    heading, row = done.stdout.splitlines()
    assert heading.split() == ["bench", "case", "median", "spread", "raw", "ratio", "spread", "load"]
    assert row.startswith("touch")
    assert "GB/s" in row


def test_an_unknown_bench_is_a_usage_error_that_names_the_known_ones() -> None:
    done = bench("precopie")
    assert done.returncode == 2
    assert "precopie" in done.stderr
    assert "collect, base, downtime" in done.stderr
