"""One run of two ranks, struck six times, is in the end the run that nothing happened to."""

import signal

import pytest

from tests.dist.test_resume import assert_same_run
from tests.faults.conftest import EVERY
from tests.faults.faultkit import (
    TIMEOUT_S,
    Job,
    Leg,
    Outcome,
    Record,
    Reference,
    assert_begins_like,
    leftovers,
    strike,
)


def end_by_sigterm(job: Job) -> None:
    """What a scheduler does to the launcher."""
    job.send(signal.SIGTERM)


def wait_and_kill_the_frozen(job: Job) -> None:
    """torchrun itself would do it 30 s after the other rank has given up."""
    job.when("error (rank 0)", TIMEOUT_S + 10)
    job.kill_frozen()


pytestmark = pytest.mark.timeout(600)  # all seven starts count for the first test

LEGS = {
    "killed at fetch": Leg("kill@1:3:fetch"),
    "killed at loss": Leg("kill@0:5:loss"),
    "frozen": Leg("freeze@1:7:forward", wait_and_kill_the_frozen),
    "bias altered": Leg("alter_bias@1:9:before_step"),
    "SIGTERM to torchrun": Leg("sleep=1@1:9:forward", end_by_sigterm),
    "killed in save": Leg("kill@1:12:save_write"),
}


@pytest.fixture(scope="module")
def struck(two_ranks: Reference) -> dict[str, Outcome]:
    return strike(two_ranks.config, two_ranks.config.parent / "struck", LEGS, ranks=2)


@pytest.mark.fault(1, "one rank killed (-9)")
@pytest.mark.parametrize("name", ["killed at fetch", "killed at loss", "killed in save"])
def test_a_killed_rank_ends_the_job_with_5(
    name: str, struck: dict[str, Outcome], two_ranks: Reference, record_property: Record
) -> None:
    outcome = struck[name]
    record_property("detected_in", outcome.detected_in)
    record_property("steps_lost", outcome.lost)
    assert outcome.code == 5
    assert outcome.detected_in < TIMEOUT_S
    assert any("another rank is gone or silent" in line for line in outcome.job.errors)
    assert outcome.lost <= 2 * EVERY
    outcome.assert_kept()
    assert 12 not in outcome.after, "a save that lost a rank publishes nothing"
    assert_begins_like(outcome.rows, two_ranks.run_dir)


@pytest.mark.fault(15, "one rank frozen (SIGSTOP)")
def test_a_frozen_rank_is_noticed_within_the_timeout(
    struck: dict[str, Outcome], two_ranks: Reference, record_property: Record
) -> None:
    outcome = struck["frozen"]
    noticed = outcome.job.when("error (rank 0)") - outcome.job.when("fault:")
    record_property("detected_in", noticed)
    record_property("steps_lost", outcome.lost)
    assert outcome.code == 5
    assert noticed <= TIMEOUT_S + 5
    assert_begins_like(outcome.rows, two_ranks.run_dir)
    log = (outcome.job.run_dir / "log.txt").read_text()
    assert "the run ended with an error" in log, "the stack of the rank that waited"
    assert "Traceback" in log


@pytest.mark.fault(14, "hook state altered on one rank")
def test_an_altered_bias_is_never_saved(struck: dict[str, Outcome], record_property: Record) -> None:
    outcome = struck["bias altered"]
    record_property("detected_in", outcome.detected_in)
    record_property("steps_lost", outcome.lost)
    assert outcome.code == 4
    assert "step 10: hook state on rank 1 differs from rank 0" in outcome.job.errors[0]
    assert max(outcome.after) == 8


@pytest.mark.fault(18, "SIGTERM to torchrun")
def test_sigterm_to_torchrun_saves_and_ends_with_75(
    struck: dict[str, Outcome], two_ranks: Reference, record_property: Record
) -> None:
    outcome = struck["SIGTERM to torchrun"]
    record_property("detected_in", outcome.detected_in)
    record_property("steps_lost", outcome.lost)
    assert outcome.code == 75, outcome.job.log[-3000:]
    assert outcome.lost == 0
    assert max(outcome.after) in (9, 10), "the step that ran when the signal came, or the one after, was the last"
    assert_begins_like(outcome.rows, two_ranks.run_dir)


@pytest.mark.fault(3, "six faults in a row")
def test_in_the_end_it_is_the_unbroken_run(struck: dict[str, Outcome], two_ranks: Reference) -> None:
    assert struck["end"].code == 0
    run_dir = struck["end"].job.run_dir
    assert_same_run(run_dir, two_ranks.run_dir)
    assert not leftovers(run_dir)
