"""After COMMIT with a silent peer: ask who runs the machine, again and again, until somebody knows."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from migrate import __version__
from migrate.coordinator import preflight
from migrate.coordinator.dialling import Dialler
from migrate.coordinator.link import Link
from migrate.coordinator.outcome import Emit
from migrate.errors import FerryError, InDoubtError, Phase
from migrate.protocol import messages as m
from migrate.protocol.states import Role

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0  # s, doubling
ANSWER_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Question:
    machine: str
    job: str
    epoch: int
    peer_incarnation: str


async def ask_once(dialler: Dialler, question: Question, host_name: str, incarnation: str) -> m.Answer:
    """:raises FerryError: if the peer cannot be reached or does not answer."""
    link = Link(await dialler.control(), Role.SOURCE)
    try:
        await link.send(m.Hello((m.PROTOCOL_VERSION,), f"vmferry {__version__}", host_name, incarnation))
        preflight.check_hello(await link.expect(m.Hello, timeout=ANSWER_SECONDS))
        await link.send(m.Ask(question.machine, question.job, question.epoch, question.peer_incarnation))
        return await link.expect(m.Answer, timeout=ANSWER_SECONDS)
    finally:
        await link.close()


async def ask_until(
    dialler: Dialler, question: Question, host_name: str, incarnation: str, seconds: float, emit: Emit
) -> str:
    """`running` or `aborted`.

    :param seconds: give up after this long; 0 asks for ever.
    :raises InDoubtError: when the time is up, or the peer says that it cannot know.
    """
    deadline = time.monotonic() + seconds if seconds else float("inf")
    pause = FIRST_PAUSE
    why = "it was not asked"
    while True:
        try:
            answer = await asyncio.wait_for(
                ask_once(dialler, question, host_name, incarnation), ANSWER_SECONDS
            )
        except TimeoutError:
            why = "it did not answer in time"
        except FerryError as error:
            why = error.reason
        else:
            if answer.state in ("running", "aborted"):
                return answer.state
            if answer.state == "unknown":
                raise _in_doubt(question, answer.detail or "its ledger is not the one that heard COMMIT")
            why = f"it has taken the machine over but does not run it yet ({answer.detail})"
        emit({"event": "in_doubt", "reason": why})
        if time.monotonic() + pause > deadline:
            raise _in_doubt(question, why)
        await asyncio.sleep(pause)
        pause = min(pause * 2, LONGEST_PAUSE)


def _in_doubt(question: Question, why: str) -> InDoubtError:
    return InDoubtError(
        f"COMMIT was sent and the peer does not say whether it runs {question.machine}: {why}",
        phase=Phase.RECOVER,
        remedy=f"mend the link and run `ferry recover {question.machine}`, or fence the other host and run "
        f"`ferry resolve {question.machine} --keep source --fenced`",
    )
