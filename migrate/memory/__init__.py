"""Guest memory in sealed memfds, page runs, dirty bitmaps and the dirty trackers. Knows no bus, no wire, no asyncio.

The module `prove` is used as such: prove.choose(), prove.make(), prove.prove().
"""

from migrate.memory.addresses import PAGE_SHIFT, PAGE_SIZE, PAGE_WORDS, GuestAddress, RegionOffset, pages_for
from migrate.memory.bitmap import DirtyBitmap
from migrate.memory.compare import CompareTracker
from migrate.memory.log import LogTracker
from migrate.memory.mapping import Pages, Region, RegionSpec
from migrate.memory.memfd import check_memfd, create_memfd, read_sealed, sealed_bytes
from migrate.memory.region import GuestMemory
from migrate.memory.runs import PageRuns
from migrate.memory.scan import ScanTracker
from migrate.memory.sendplan import SendPlan
from migrate.memory.tracker import NoTracker, Tracker

__all__ = [
    "PAGE_SHIFT",
    "PAGE_SIZE",
    "PAGE_WORDS",
    "CompareTracker",
    "DirtyBitmap",
    "GuestAddress",
    "GuestMemory",
    "LogTracker",
    "NoTracker",
    "PageRuns",
    "Pages",
    "Region",
    "RegionOffset",
    "RegionSpec",
    "ScanTracker",
    "SendPlan",
    "Tracker",
    "check_memfd",
    "create_memfd",
    "pages_for",
    "read_sealed",
    "sealed_bytes",
]
