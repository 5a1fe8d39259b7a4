"""What two QEMUs must agree on, as reasons; whatever a peer writes as its facts is only compared."""

from __future__ import annotations

from dataclasses import replace

import pytest

from migrate.qemu import facts as compared
from migrate.qemu.facts import Facts

GOOD = Facts(
    machine="pc-q35-7.2",
    ram=262152 << 10,
    cpus=2,
    cpu="qemu64",
    pci={"00.00.0": "8086.29c0", "00.01.0": "1af4.1042"},
    state="ferry",
    version="7.2.22",
    accel="tcg",
    backend="ferry-ram",
    capabilities=frozenset({"return-path", "pause-before-switchover", "events", "multifd"}),
)


def reasons(facts: Facts) -> str:
    return " | ".join(reason.reason for reason in compared.against(facts, "vcpu0"))


def test_a_qemu_that_is_right_has_nothing_against_it_and_equals_itself() -> None:
    assert reasons(GOOD) == ""
    assert compared.differences(GOOD.to_options(), GOOD, "vcpu0") == []


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"machine": "pc-i440fx-7.2"}, "machine type"),
        ({"ram": 1 << 30}, "memory size"),
        ({"cpus": 4}, "number of processors"),
        ({"cpu": "max"}, "processor model"),
        ({"state": "qemu"}, "way of devices' states"),
        ({"pci": {"00.00.0": "8086.29c0"}}, "at PCI address 00.01.0 the source has 1af4.1042"),
        ({"pci": {**GOOD.pci, "00.02.0": "1af4.1005"}}, "the source has nothing"),
    ],
)
def test_each_difference_is_named(changed: dict[str, object], word: str) -> None:
    found = compared.differences(GOOD.to_options(), replace(GOOD, **changed), "vcpu0")  # type: ignore[arg-type]
    assert len(found) == 1
    assert word in found[0].reason
    assert found[0].device == "vcpu0"


def test_all_differences_come_at_once() -> None:
    other = replace(GOOD, machine="microvm", cpus=1, ram=1 << 28)
    assert len(compared.differences(GOOD.to_options(), other, "vcpu0")) == 3


def test_facts_of_a_hostile_peer_are_cut_and_compared_and_nothing_more() -> None:
    found = compared.differences(
        {"machine": "x" * 1000, "pci.": "y" * 1000, "pci." + "z" * 900: ""}, GOOD, "vcpu0"
    )
    assert found
    assert all(len(reason.reason) < 300 for reason in found)


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ({"ram": 256 << 20}, True),
        ({"ram": (256 << 20) + 8192}, False),
        ({"ram": 256 << 20, "accel": "kvm"}, False),
        ({"ram": 256 << 20, "version": "9.0.0"}, False),
        ({"ram": 256 << 20, "version": "8.2.1"}, True),
        ({"ram": 256 << 20, "version": "garbage"}, True),
    ],
)
def test_memory_that_tcg_before_9_0_corrupts_is_refused(changed: dict[str, object], refused: bool) -> None:
    assert ("under TCG loses writes" in reasons(replace(GOOD, **changed))) is refused  # type: ignore[arg-type]


def test_what_qemu_says_blocks_it_is_quoted_and_what_it_lacks_is_named() -> None:
    found = reasons(
        replace(GOOD, blocked=("x-pci-proxy-dev does not support migration",), capabilities=frozenset())
    )
    assert "QEMU refuses to migrate: x-pci-proxy-dev does not support migration" in found
    assert "lacks return-path, pause-before-switchover, events" in found


def test_a_dbus_vmstate_that_nobody_asked_for_is_refused_and_one_that_is_missing_too() -> None:
    assert "QEMU has a dbus-vmstate" in reasons(replace(GOOD, vmstate=True))
    assert "QEMU has no dbus-vmstate" in reasons(replace(GOOD, state="qemu"))
    assert reasons(replace(GOOD, state="qemu", vmstate=True)) == ""


def test_an_older_qemu_over_there_is_told() -> None:
    assert compared.is_older(GOOD.to_options(), replace(GOOD, version="7.1.0"))
    assert compared.is_older(GOOD.to_options(), GOOD) is None
    assert compared.is_older({}, GOOD) is None


def test_facts_travel_within_the_bounds_of_options() -> None:
    for key, value in GOOD.to_options().items():
        assert len(key) <= 63
        assert len(value) <= 200
