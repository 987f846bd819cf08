"""The long chains: a rank dies in every phase of the loop, a job is asked to stop at every moment, and all else that
strikes a rank. A run is struck again and again, and must come out as the unbroken one.
"""

import re
import signal

import pytest

from tests.dist.test_resume import assert_same_run
from tests.faults.conftest import EVERY, STEPS, make_reference
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
from tests.harness import rows
from trainer.data.config import DataConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def twice(job: Job) -> None:
    """A scheduler that repeats itself."""
    job.send(signal.SIGTERM, to="ranks")
    job.send(signal.SIGTERM, to="all")


# A checkpoint is sure to be there once the next save has begun: kills come that much later than the one they need.
KILLS = {
    "evaluate": Leg("kill@1:0:evaluate"),
    "build": Leg("kill@0:0:build"),
    "fetch": Leg("kill@0:5:fetch"),
    "load": Leg("kill@1:0:load"),
    "forward": Leg("kill@1:5:forward"),
    "loss": Leg("kill@1:6:loss"),
    "before_step": Leg("kill@0:7:before_step"),
    "after_step": Leg("kill@1:7:after_step"),
    "save_write": Leg("kill@0:8:save_write"),
    "save_before_manifest": Leg("kill@0:10:save_before_manifest"),
    "save_before_rename": Leg("kill@0:10:save_before_rename"),
}
OTHERS = {
    "slow rank in save": Leg("sleep=5@1:10:save_write,kill@0:10:save_write"),
    "parameter altered": Leg("alter_parameter@1:9:before_step"),
    "exception": Leg("raise@1:10:loss"),
    "interrupt": Leg("interrupt@0:10:before_step"),
    "extra collective": Leg("barrier@1:10:before_step"),
    "disk error": Leg("io_error@1:10:save_write,io_error@1:10:save_write"),
    "restart": Leg("kill@1:13:loss", torchrun="--max-restarts 1"),
}
STOPS = {
    "before step 1": Leg("terminate@1:0:evaluate"),
    "fetch": Leg("terminate@1:3:fetch"),
    "while rank 0 still loads": Leg("terminate@0:0:load"),
    "forward": Leg("terminate@0:5:forward"),
    "save": Leg("terminate@1:8:save_write"),
    "evaluate": Leg("terminate@0:12:evaluate"),
    "twice": Leg("sleep=1@1:14:forward", twice),
}


@pytest.fixture(scope="module")
def no_zero(tmp_path_factory: pytest.TempPathFactory, data_config: DataConfig) -> Reference:
    """An unbroken run without ZeRO, where nothing but a checkpoint would mend a parameter that one rank got wrong."""
    return make_reference(
        tmp_path_factory.mktemp("no-zero"), data_config, ranks=2,
        engine={"zero_stage": 0, "collective_timeout_s": TIMEOUT_S},
    )  # fmt: skip


@pytest.fixture(scope="module")
def killed(no_zero: Reference) -> dict[str, Outcome]:
    return strike(no_zero.config, no_zero.config.parent / "killed", KILLS, ranks=2)


@pytest.fixture(scope="module")
def struck(no_zero: Reference) -> dict[str, Outcome]:
    return strike(no_zero.config, no_zero.config.parent / "struck", OTHERS, ranks=2)


@pytest.fixture(scope="module")
def stopped(two_ranks: Reference) -> dict[str, Outcome]:
    return strike(two_ranks.config, two_ranks.config.parent / "stopped", STOPS, ranks=2)


@pytest.mark.fault(1, "one rank killed (-9), every phase")
@pytest.mark.parametrize("phase", KILLS)
def test_killed_in_any_phase(
    phase: str, killed: dict[str, Outcome], no_zero: Reference, record_property: Record
) -> None:
    outcome = killed[phase]
    record_property("detected_in", outcome.detected_in)
    record_property("steps_lost", outcome.lost)
    assert outcome.code == 5, outcome.job.log[-3000:]
    # Measured: a rank that waited for a group of the dead can take the timeout once more until its process is gone.
    assert outcome.detected_in < (2 * TIMEOUT_S if phase == "build" else TIMEOUT_S) + 5
    assert outcome.lost <= 2 * EVERY, "those since the newest one, and those trained while the next was written"
    outcome.assert_kept()
    assert_begins_like(outcome.rows, no_zero.run_dir)


@pytest.mark.fault(3, "eleven kills in a row")
def test_eleven_kills_change_nothing(killed: dict[str, Outcome], no_zero: Reference) -> None:
    assert killed["end"].code == 0
    run_dir = killed["end"].job.run_dir
    assert_same_run(run_dir, no_zero.run_dir)
    assert [row["step"] for row in rows(run_dir) if "loss" in row] == list(range(1, STEPS + 1)), "every batch once"
    assert not leftovers(run_dir)


@pytest.mark.fault(5, "slow rank while rank 0 dies in save")
def test_a_save_that_not_all_have_finished_is_not_published(
    struck: dict[str, Outcome], no_zero: Reference, record_property: Record
) -> None:
    outcome = struck["slow rank in save"]
    record_property("detected_in", outcome.detected_in)
    record_property("steps_lost", outcome.lost)
    assert outcome.code == 5
    assert max(outcome.after) == 8
    outcome.assert_kept()
    assert_begins_like(outcome.rows, no_zero.run_dir)


@pytest.mark.fault(14, "parameter altered on one rank")
def test_an_altered_parameter_is_never_saved(struck: dict[str, Outcome], record_property: Record) -> None:
    outcome = struck["parameter altered"]
    record_property("detected_in", outcome.detected_in)
    record_property("steps_lost", outcome.lost)
    assert outcome.code == 4
    assert "step 10: blocks.0.attention_norm.weight on rank 1 differs" in outcome.job.errors[0]
    assert outcome.after == outcome.before


@pytest.mark.fault(19, "exception on one rank")
def test_an_exception_keeps_its_traceback(struck: dict[str, Outcome], record_property: Record) -> None:
    outcome = struck["exception"]
    record_property("detected_in", outcome.detected_in)
    record_property("steps_lost", outcome.lost)
    assert outcome.code == 1
    assert "RuntimeError: a fault on purpose" in outcome.job.log
    assert outcome.detected_in < TIMEOUT_S
    outcome.assert_kept()


@pytest.mark.fault(19, "SIGINT to one rank")
def test_interrupted(struck: dict[str, Outcome], record_property: Record) -> None:
    outcome = struck["interrupt"]
    record_property("detected_in", outcome.detected_in)
    record_property("steps_lost", outcome.lost)
    assert outcome.code == 130
    assert outcome.detected_in < TIMEOUT_S + 5
    outcome.assert_kept()


@pytest.mark.fault(16, "one rank calls another collective")
def test_a_collective_too_many_is_an_error_and_no_hang(struck: dict[str, Outcome], record_property: Record) -> None:
    outcome = struck["extra collective"]
    record_property("detected_in", outcome.detected_in)
    record_property("steps_lost", outcome.lost)
    assert outcome.code != 0
    assert outcome.detected_in <= TIMEOUT_S + 5
    outcome.assert_kept()


@pytest.mark.fault(9, "input/output error on one rank in save")
def test_a_disk_error_is_exit_6_on_all(struck: dict[str, Outcome], record_property: Record) -> None:
    outcome = struck["disk error"]
    record_property("detected_in", outcome.detected_in)
    record_property("steps_lost", outcome.lost)
    assert outcome.code == 6
    assert "cannot write the checkpoint of step 10 (rank 1: [Errno 5] Input/output error" in outcome.job.errors[0]
    assert outcome.after == outcome.before
    assert not leftovers(outcome.job.run_dir)


@pytest.mark.fault(31, "one rank killed under torchrun --max-restarts 1")
def test_torchrun_restarts_the_job_by_itself(
    struck: dict[str, Outcome], no_zero: Reference, record_property: Record
) -> None:
    outcome = struck["restart"]
    record_property("detected_in", outcome.job.when("resumed from step 1") - outcome.job.when("fault:"))
    resumed = int(re.findall("resumed from step ([0-9]+)", outcome.job.log)[-1])
    record_property("steps_lost", 12 - resumed)  # the thirteenth had not ended
    assert resumed in (10, 12)
    assert outcome.code == 0, outcome.job.log[-3000:]
    assert_same_run(outcome.job.run_dir, no_zero.run_dir)
    assert not leftovers(outcome.job.run_dir)


@pytest.mark.fault(18, "SIGTERM to one rank or all, at every moment")
@pytest.mark.parametrize("moment", STOPS)
def test_sigterm_at_any_moment_loses_no_step(
    moment: str, stopped: dict[str, Outcome], two_ranks: Reference, record_property: Record
) -> None:
    outcome = stopped[moment]
    record_property("detected_in", outcome.detected_in)
    record_property("steps_lost", outcome.lost)
    assert outcome.code == 75, outcome.job.log[-3000:]
    assert outcome.lost == 0
    outcome.assert_kept()
    assert_begins_like(outcome.rows, two_ranks.run_dir)


@pytest.mark.fault(18, "SIGTERM to one rank or all, at every moment")
def test_seven_stops_change_nothing(stopped: dict[str, Outcome], two_ranks: Reference) -> None:
    assert stopped["end"].code == 0
    assert_same_run(stopped["end"].job.run_dir, two_ranks.run_dir)
    assert not leftovers(stopped["end"].job.run_dir)
