"""The targets, and how one is run: an input is a finding if it raises what it must not, takes too long or too much memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tests.fuzz import blobs, schemas, streams
from tests.fuzz.mutate import inputs

#: One input may take that long, s: these machines are shared.
LONGEST: Final = 10.0
#: A target may make the process grow by that much, KiB.
MOST: Final = 512 << 10


@dataclass(frozen=True, slots=True)
class Target:
    run: Callable[[bytes], None]
    corpus: Callable[[], Sequence[bytes]]


TARGETS: Final[Mapping[str, Target]] = {
    "envelope": Target(blobs.envelope, blobs.corpus),
    "state": Target(blobs.state, blobs.corpus),
    "schema": Target(schemas.schema, schemas.corpus),
    "qemu-stream": Target(streams.stream, streams.corpus),
}


class Finding(Exception):
    """An input that broke its target."""

    def __init__(self, what: str, data: bytes, count: int) -> None:
        super().__init__(what)
        self.data = data
        self.count = count


def fuzz(target: Target, seed: int, seconds: float) -> int:
    """How many inputs were tried, the corpus among them. :raise Finding: the first that broke it."""
    deadline = time.monotonic() + seconds
    corpus = list(target.corpus())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = 0
    for data in inputs(corpus, seed):
        began = time.monotonic()
        try:
            target.run(data)
        except Exception as error:
            raise Finding(f"{type(error).__name__}: {error}", data, count) from error
        count += 1
        now = time.monotonic()
        if now - began > LONGEST:
            raise Finding(f"took {now - began:.1f} s", data, count)
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > MOST:
            raise Finding("took more than 512 MiB", data, count)
        if now > deadline and count >= len(corpus):
            break
    return count
