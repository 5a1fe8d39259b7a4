"""The memory that most tests of this directory use."""

from migrate.memory import PAGE_SIZE, GuestAddress, RegionSpec

HIGH = GuestAddress(1 << 32)
#: Two regions, the second made first, neither a multiple of a compare block or of a bitmap's byte.
LAYOUT = [RegionSpec(HIGH, 43 * PAGE_SIZE), RegionSpec(GuestAddress(0), 21 * PAGE_SIZE)]
PAGES = 64
