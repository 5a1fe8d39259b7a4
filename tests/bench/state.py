"""Encoding and decoding of states beside bare msgpack of the same values: what being canonical, bounded and judged costs.

The golden states of our own devices, and two that are made (10 KB, 1 MiB): registers as structs in a list, and a FIFO. Times are
for one state, without the envelope.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack

from migrate.state import SchemaVersion, blob, catalog
from migrate.state.parse import parse
from tests.bench.figures import Figure, Scale

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TYPICAL = ("uart16550", "rtc", "virtio-blk", "vcpu")
RUNS = 15
#: Long enough for a clock, short enough for a bench, s.
LEAST = 0.02


def run(scale: Scale) -> Iterator[Figure]:
    for name in TYPICAL:
        schema = catalog.load(name)
        version = schema.at(schema.version)
        values = json.loads((GOLDEN / f"{name}-v{version.version}.json").read_text(), object_hook=_bytes)
        yield from _both(name, version, values, scale)
    for case, registers, fifo in (("10 KB", 200, 4096), ("1 MiB", 16000, 1 << 19)):
        yield from _both(case, *_made(registers, fifo), scale)


def run_dump(scale: Scale) -> Iterator[Figure]:
    """`ferry blob dump` of a blob whose payload is one value of bytes: how fast, and how much memory it takes beyond Python's."""
    size = (1 if scale.quick else 64) << 20
    made = blob.pack(blob.Blob("uart16550", "big0", 1, bytes(32), b""))
    head = made[:48] + (size + 8).to_bytes(4, "big") + made[52:-4]
    with tempfile.NamedTemporaryFile(suffix=".blob") as file:
        file.write(head + b"\x81\xa1a\xc6" + size.to_bytes(4, "big"))
        for _ in range(size >> 20):
            file.write(bytes(range(256)) * 4096)
        file.flush()
        program = (
            "import resource, sys\nfrom migrate.cli.main import main\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nmain(['blob', 'dump', sys.argv[1]])\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, file=sys.stderr)"
        )
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", program, file.name], cwd=GOLDEN.parents[1], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, check=False,
        )  # fmt: skip
        took = time.perf_counter() - began
    grown = int(done.stderr.split()[-1]) / 1024
    yield Figure("dump", f"{size >> 20} MiB", "MB/s", [size / took / 1e6])
    yield Figure("dump", f"{size >> 20} MiB: memory, the mapped file itself among it", "MiB", [grown])


def _made(registers: int, fifo: int) -> tuple[SchemaVersion, dict[str, object]]:
    text = (
        'type = "bench"\nversion = 1\n[[field]]\nname = "registers"\n'
        f'type = "list<={registers}"\n'
        'item = { type = "struct", fields = [ { name = "offset", type = "u32" }, { name = "value", type = "u64" } ] }\n'
        f'[[field]]\nname = "fifo"\ntype = "bytes<={fifo}"\n'
    )
    values: dict[str, object] = {
        "registers": [
            {"offset": 4 * at, "value": at * 0x9E3779B97F4A7C15 % (1 << 64)} for at in range(registers)
        ],
        "fifo": bytes(at % 251 for at in range(fifo)),
    }
    return parse(text, "bench").at(1), values


def _both(case: str, version: SchemaVersion, values: dict[str, object], scale: Scale) -> Iterator[Figure]:
    data = version.encode(values)
    bare = msgpack.packb(version.decode(data))
    assert bare == data, "the canonical form is what msgpack writes"
    size = f"{case} ({len(data)} bytes)"
    runs = scale.runs(RUNS)
    yield _figure(f"encode {size}", runs, lambda: version.encode(values), lambda: msgpack.packb(values))
    yield _figure(f"decode {size}", runs, lambda: version.decode(data), lambda: msgpack.unpackb(data))


def _figure(case: str, runs: int, ours: Callable[[], object], bare: Callable[[], object]) -> Figure:
    """In turn, so that what else the machine does meets both."""
    mine, limit = [], []
    for _ in range(runs):
        limit.append(_microseconds(bare))
        mine.append(_microseconds(ours))
    return Figure("state", case, "µs", mine, limit, "raw: bare msgpack")


def _microseconds(work: Callable[[], object]) -> float:
    times, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < LEAST or not times:
        work()
        times += 1
    return passed / times * 1e6


def _bytes(table: dict[str, object]) -> object:
    match table:
        case {"hex": str(digits)} if len(table) == 1:
            return bytes.fromhex(digits)
    return table
