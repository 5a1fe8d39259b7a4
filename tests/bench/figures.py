"""One figure: samples of one thing beside samples of its raw limit, and how a run of the bench is printed."""

from __future__ import annotations

import json
import os
import platform
import ssl
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured. `quick` shows that the bench works; its figures mean nothing."""

    quick: bool = False

    @property
    def size(self) -> int:
        """Bytes of memory."""
        return 8 * MIB if self.quick else GIB

    def runs(self, usual: int) -> int:
        return 1 if self.quick else usual


@dataclass(frozen=True, slots=True)
class Figure:
    """:ivar samples: none where it cannot be measured here; `note` then says why.
    :ivar raw: samples of the limit, as many as `samples` and taken in turn with them, in the same unit; or none."""

    bench: str
    case: str
    unit: str
    samples: Sequence[float]
    raw: Sequence[float] = ()
    note: str = ""
    load: float = field(default_factory=lambda: os.getloadavg()[0])  #: of the host, when it was taken

    def ratios(self) -> list[float]:
        return [mine / limit for mine, limit in zip(self.samples, self.raw, strict=True)] if self.raw else []

    def to_json(self) -> dict[str, Any]:
        """One line of `--json`; every spread is the lowest and the highest."""
        return {
            "event": "figure",
            "bench": self.bench,
            "case": self.case,
            "unit": self.unit,
            "runs": len(self.samples),
            "value": _spread(self.samples),
            "raw": _spread(self.raw),
            "ratio": _spread(self.ratios()),
            "load": round(self.load, 2),
            "note": self.note,
        }

    def row(self) -> tuple[str, ...]:
        ratios = self.ratios()
        return (
            self.bench,
            self.case,
            f"{_short(statistics.median(self.samples))} {self.unit}" if self.samples else "",
            _range(self.samples),
            _short(statistics.median(self.raw)) if self.raw else "",
            _short(statistics.median(ratios)) if ratios else "",
            _range(ratios),
            f"{self.load:.1f}",
            self.note,
        )


HEADINGS = ("bench", "case", "median", "spread", "raw", "ratio", "spread", "load", "")


def _spread(samples: Sequence[float]) -> dict[str, float] | None:
    if not samples:
        return None
    found = {"median": statistics.median(samples), "low": min(samples), "high": max(samples)}
    return {name: float(f"{value:.5g}") for name, value in found.items()}


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _range(samples: Sequence[float]) -> str:
    return f"{_short(min(samples))}–{_short(max(samples))}" if len(samples) > 1 else ""


def table(figures: Sequence[Figure]) -> str:
    """All figures, for a person."""
    rows = [HEADINGS, *(figure.row() for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    return {
        "event": "machine",
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "openssl": ssl.OPENSSL_VERSION,
        "dbus": _version("dbus-next"),
        "unicorn": _version("unicorn"),
        "load": [round(value, 2) for value in os.getloadavg()],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def as_line(what: dict[str, Any]) -> str:
    return json.dumps(what, ensure_ascii=False, separators=(",", ":"))
