"""The plugin in a project that has it installed: what its fixtures give, and that it costs nothing where they are not used."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Before any test: pytester puts sys.modules back as they were, and NumPy is imported once a process or not at all.
from migrate.testing.faults import FAULTS
from tests.integration.testing.test_assert_migratable import PLANTED

HEAVY = {
    "numpy",
    "hypothesis",
    "msgpack",
    "dbus_next",
    "asyncio",
    "migrate.bus",
    "migrate.memory",
    "migrate.state",
}


def imported(what: str) -> set[str]:
    program = f"import sys, {what}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_a_project_that_does_not_use_it_imports_nothing_of_it() -> None:
    assert HEAVY & imported("migrate.testing.plugin") - imported("pytest") == set()


def test_its_fixtures_are_there_without_an_import(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        def test_it(private_bus, guest_memory, faulty_helper, assert_migratable):
            memory = guest_memory(1 << 20)
            assert len(memory.regions[0].view) == 1 << 20
            assert private_bus.startswith("unix:path=")
            assert faulty_helper("h0", "right").poll() is None
            assert callable(assert_migratable)
        """
    )
    pytester.runpytest_subprocess().assert_outcomes(passed=1)


def test_a_device_that_forgets_fails_a_test_of_its_author(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        f"""
        import sys
        from migrate.testing.driver import Read, Write

        def test_it_survives(assert_migratable):
            assert_migratable(
                [sys.executable, {PLANTED!r}, "forgets-register"], registers=[Read(8)], traffic=[Write(8, 7)],
                moving=["count"], moving_registers=[0],
            )
        """
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*register 0x8 (region 0) reads as 0x7 where the machine stayed, 0x5a5a where it arrived*"]
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_every_helper_is_on_the_bus_until_the_test_ends(fault: str, faulty_helper) -> None:  # type: ignore[no-untyped-def]
    process = faulty_helper("h0", fault)
    assert process.poll() is None


def test_a_pair_of_processes_hands_a_state_over(device_pair) -> None:  # type: ignore[no-untyped-def]
    pair = device_pair([sys.executable, "-m", "devices.uart16550"])
    source, target = pair.source.client, pair.target.client
    for state in ("RUNNING_P2P", "STOP"):
        pair.run(source.set_state(state))
    data = pair.run(source.save_as(3))
    pair.run(target.stage(data))
    pair.run(target.apply())
    assert pair.run(target.set_state("STOP")) == "STOP"
    assert pair.run(target.save_as(3)) == data
