"""Whatever happens to one machine and two hosts, exactly one runs it and nothing is lost. The short form of `make chaos`."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.histories.history import History

pytest.importorskip("unicorn", reason="the embedded vCPU needs the extra `vcpu`")


@pytest.mark.timeout(600)
def test_a_random_history_never_loses_the_machine() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        History,
        settings=settings(
            max_examples=4,  # the first that Hypothesis tries is always the simplest
            stateful_step_count=5,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
