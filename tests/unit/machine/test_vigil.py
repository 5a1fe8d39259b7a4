"""Who is silent is found out; who answers, whatever it is, or is not wanted any more, is not."""

from __future__ import annotations

import asyncio

import pytest

from migrate.errors import DeviceGone, DeviceRefused, DeviceTimeout, FerryError
from migrate.machine.vigil import silent


def played(*answers: FerryError | None, wanted: int = 100) -> tuple[bool, int]:
    """Whether it was found silent, and how often it was asked."""
    asked = 0

    async def ping(name: str, seconds: float) -> None:
        nonlocal asked
        asked += 1
        answer = answers[min(asked, len(answers)) - 1]
        if answer is not None:
            raise answer

    async def main() -> bool:
        return await asyncio.wait_for(silent(":1.7", ping, lambda: asked < wanted, every=0, patience=1), 5)

    return asyncio.run(main()), asked


@pytest.mark.parametrize("error", [DeviceTimeout("no answer"), DeviceGone("gone")])
def test_one_that_gives_no_answer_is_silent(error: FerryError) -> None:
    assert played(None, None, error) == (True, 3)


def test_one_that_answers_with_an_error_is_alive() -> None:
    assert played(DeviceRefused("no such object"), wanted=5) == (False, 5)


def test_when_nobody_wants_to_know_any_more_it_ends() -> None:
    assert played(None, wanted=3) == (False, 3)
    # Also where the answer fails to come in that very moment.
    assert played(DeviceTimeout("no answer"), wanted=1) == (False, 1)
