"""Every version of every type that vmferry has, as a blob from the day it was released, read and written to the byte."""

from __future__ import annotations

import sys
import timeit
from pathlib import Path

import pytest

from migrate.state import SchemaVersion, catalog
from migrate.state.blob import MAGIC, pack, read, unpack, write

GOLDEN = Path(__file__).parents[2] / "golden"
sys.path.insert(0, str(GOLDEN))
import make_golden  # noqa: E402

ALL = [catalog.load(name).at(number) for name in catalog.types() for number in catalog.load(name).versions]


@pytest.mark.parametrize("version", ALL, ids=lambda version: f"{version.type}-v{version.version}")
def test_a_golden_blob_is_read_and_written_again_to_the_byte(version: SchemaVersion) -> None:
    path = GOLDEN / f"{version.type}-v{version.version}.blob"
    assert path.exists(), f"a schema version without its golden blob: see {GOLDEN / 'make_golden.py'}"
    data = path.read_bytes()
    assert unpack(data).digest == version.digest, "a released version was changed: restore the schema file"
    written_in, values = read(data, catalog.load(version.type))
    assert written_in.version == version.version
    assert values == make_golden.values_of(version.type, version.version)
    assert write(version, unpack(data).instance, values) == data
    assert pack(unpack(data)) == data


def test_every_golden_blob_belongs_to_a_version() -> None:
    assert {path.stem for path in GOLDEN.glob("*.blob")} == {
        f"{version.type}-v{version.version}" for version in ALL
    }
    assert all(path.read_bytes().startswith(MAGIC) for path in GOLDEN.glob("*.blob"))


def test_no_field_has_only_its_default_in_a_types_golden_blobs() -> None:
    """A field that a golden blob leaves at zero could be lost without a test failing."""
    for name in catalog.types():
        schema = catalog.load(name)
        newest = schema.at(schema.version)
        states = [make_golden.values_of(name, version) for version in schema.versions]
        plain = {"format", "irq_pending", "refused"}  # of one word only, or false in a state that can be
        same = {
            entry.name
            for entry in newest.fields
            if all(values.get(entry.name, entry.fallback) == entry.fallback for values in states)
        }
        assert same <= plain, name


def test_the_state_of_a_processor_is_encoded_and_decoded_in_under_100_microseconds() -> None:
    version = catalog.load("vcpu").at(1)
    values = make_golden.values_of("vcpu", 1)
    data = version.encode(values)
    for work in (lambda: version.encode(values), lambda: version.decode(data)):
        # The best of many: what other processes do to this machine is not measured.
        assert min(timeit.repeat(work, number=10, repeat=50)) / 10 < 100e-6
