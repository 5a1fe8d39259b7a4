"""Our vfio-user server and libvfio-user's answer the same messages alike, but for what is listed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.interop.libvfio.__main__ import ask
from tests.interop.libvfio.differences import DIFFERENCES, table
from tests.interop.libvfio.ours import serve
from tests.interop.libvfio.script import RECORDED, SCENES, Step
from tests.interop.libvfio.talk import Answer, play

Answers = dict[str, list[Answer]]


@pytest.fixture(scope="module")
def theirs() -> Answers:
    """As recorded; of the library that FERRY_LIBVFIO_USER names (a checkout, built in build/) where there is one."""
    named = os.environ.get("FERRY_LIBVFIO_USER")
    if named:
        return ask(Path(named))
    found: Answers = json.loads(RECORDED.read_text())
    return found


def _differing(scene: str, steps: list[Step], theirs: list[Answer], ours: list[Answer]) -> list[str]:
    """What is not as it should be, a line each."""
    wrong = []
    for number, step in enumerate(steps):
        there = theirs[number] if number < len(theirs) else None
        here = ours[number] if number < len(ours) else None
        listed = DIFFERENCES.get((scene, step.name))
        if listed is not None and there == listed.ours:
            wrong.append(f"{step.name}: no longer a difference")
        wanted = there if listed is None else listed.ours
        if here != wanted:
            wrong.append(f"{step.name}: {here} instead of {wanted}")
    return wrong


@pytest.mark.parametrize("scene", SCENES)
def test_our_server_answers_as_libvfio_user_does_or_as_is_listed(
    scene: str, theirs: Answers, tmp_path: Path
) -> None:
    with serve(f"{tmp_path}/s"):
        ours = play(f"{tmp_path}/s", SCENES[scene])
    assert _differing(scene, SCENES[scene], theirs[scene], ours) == []


def test_the_comparison_sees_what_differs_what_is_missing_and_what_is_listed_in_vain() -> None:
    steps = [Step("unknown command", 99), Step("other", 4)]
    error: Answer = {"errno": 22}
    listed: Answer = {"errno": 95}
    assert _differing("requests", steps, [error, error], [listed, error]) == []
    assert len(_differing("requests", steps, [error, error], [listed, listed])) == 1
    assert len(_differing("requests", steps, [error, error], [listed])) == 1
    assert len(_differing("requests", steps, [listed, error], [listed, error])) == 1


def test_every_listed_difference_is_one_of_a_message_that_is_sent() -> None:
    sent = {(scene, step.name) for scene, steps in SCENES.items() for step in steps}
    assert DIFFERENCES.keys() <= sent
    assert sum(len(steps) for steps in SCENES.values()) > 200


def test_the_page_has_every_difference() -> None:
    page = Path(__file__).parents[2] / "docs" / "vfio-user.md"
    assert table() in page.read_text()
