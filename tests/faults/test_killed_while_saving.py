"""Death at three points of a save leaves the checkpoints of before as they were; W&B that refuses changes nothing."""

import pytest

from tests.dist.test_resume import assert_same_run
from tests.faults.faultkit import Leg, Outcome, Record, Reference, assert_begins_like, leftovers, strike

SAVES = {
    "files half written": (4, Leg("kill@0:4:save_write")),
    # The checkpoint of step 4 is written while steps 5 and 6 train: the next leg goes on from it.
    "before the manifest": (6, Leg("sleep=1@0:4:save_start,kill@0:6:save_before_manifest")),
    "before the rename": (8, Leg("kill@0:8:save_before_rename")),
}
REFUSED = {"WANDB_MODE": "online", "WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}


@pytest.fixture(scope="module")
def struck(one_rank: Reference) -> dict[str, Outcome]:
    legs = {name: leg for name, (_, leg) in SAVES.items()} | {
        "W&B refuses": Leg(overrides=("wandb.mode=online",), env=REFUSED)
    }
    return strike(one_rank.config, one_rank.config.parent / "saving", legs, ranks=0)


@pytest.mark.fault(4, "killed while it saves")
@pytest.mark.parametrize("name", SAVES)
def test_nothing_is_published_and_nothing_lost(
    name: str, struck: dict[str, Outcome], one_rank: Reference, record_property: Record
) -> None:
    step, outcome = SAVES[name][0], struck[name]
    record_property("detected_in", outcome.detected_in)
    record_property("steps_lost", outcome.lost)
    assert outcome.code == -9
    assert max(outcome.after) == step - 2
    assert 2 <= outcome.lost <= 4, "those since the newest one, and those trained while the next was written"
    outcome.assert_kept()
    assert_begins_like(outcome.rows, one_rank.run_dir)


@pytest.mark.fault(20, "W&B refuses")
def test_training_does_not_notice_that_wandb_refuses(
    struck: dict[str, Outcome], one_rank: Reference, record_property: Record
) -> None:
    outcome = struck["W&B refuses"]
    record_property("steps_lost", outcome.lost)
    assert outcome.code == 0
    assert outcome.job.log.count("W&B ") == 1, "said once"
    assert "metrics.jsonl is complete" in outcome.job.log
    assert_same_run(outcome.job.run_dir, one_rank.run_dir)
    assert not leftovers(outcome.job.run_dir), "the remains of the saves are cleared"
    assert struck["end"].code == 0, "a finished run started again does nothing"
