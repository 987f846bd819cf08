"""The certificate holds for a healthy run and names each way in which balancing can be broken."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.bias_hook import ExpertBiasHook
from moe.model import MoEDecoder
from tests.harness import ROOT, environment
from tests.moe.test_bias_hook import APPLIED, SKIPPED, Records, forward, started, step_of
from trainer.errors import NumericError
from trainer.hooks import EvaluationContext, StepContext


def step_with(tokens: int) -> StepContext:
    step = step_of(Records())
    step.tokens_B = torch.tensor([tokens, 0, 0, 0])
    return step


def certified(hook: ExpertBiasHook) -> dict[str, Any]:
    records = Records()
    hook.on_evaluate(EvaluationContext(step=7, tokens=36, recorder=records))
    return records.values


def run(hook: ExpertBiasHook, model: MoEDecoder) -> None:
    for seed in range(3):
        forward(model, seed)
        hook.after_step(step_with(36), APPLIED)


def test_a_healthy_run_is_certified() -> None:
    hook, model = started()
    run(hook, model)
    forward(model)
    hook.after_step(step_with(36), SKIPPED)
    assert certified(hook)["moe/certificate"] == 1


def test_a_bias_that_others_move_is_found() -> None:
    hook, model = started()
    run(hook, model)
    model.moe_layers()[1].router.expert_bias_E[2] += 1e-6
    forward(model)
    hook.after_step(step_with(36), SKIPPED)
    with pytest.raises(NumericError, match="something besides its hook has moved a bias"):
        certified(hook)


def test_counting_twice_is_found() -> None:
    hook, model = started()
    forward(model)
    forward(model)  # as recomputation does where counting is a side effect
    hook.after_step(step_with(36), APPLIED)
    with pytest.raises(NumericError, match="loads are not tokens x k in 2 layers and steps"):
        certified(hook)


def test_a_layer_without_balancing_is_found() -> None:
    hook, model = started()
    run(hook, model)
    model.extra = torch.nn.Module()
    model.extra.register_buffer("expert_bias_E", torch.zeros(8))
    hook.on_start(run_with(model))
    with pytest.raises(NumericError, match="2 of 3 MoE layers are balanced"):
        certified(hook)


def run_with(model: MoEDecoder) -> Any:
    from tests.moe.test_bias_hook import run_of

    return run_of(model)


def test_a_bias_in_low_precision_is_found() -> None:
    hook, model = started()
    run(hook, model)
    assert hook._certificate is not None
    hook._certificate._biases[0] = hook._certificate._biases[0].bfloat16()
    with pytest.raises(NumericError, match="not float32"):
        certified(hook)


SCRIPT = """
import sys, torch, torch.distributed as dist
from tests.moe.test_bias_hook import APPLIED, forward, started
from tests.moe.test_certificate import certified, step_with
from trainer.errors import NumericError

dist.init_process_group("gloo")
calls = []
plain = dist.all_reduce
dist.all_reduce = lambda *a, **k: (calls.append(1), plain(*a, **k))[1]
hook, model = started()
forward(model, seed=dist.get_rank())
hook.after_step(step_with(72), APPLIED)
assert len(calls) == 1, f"{len(calls)} all-reduces for {len(model.moe_layers())} layers"
assert certified(hook)["moe/certificate"] == 1
if dist.get_rank() == 1:
    model.moe_layers()[0].router.expert_bias_E[0] += 1e-6
try:
    certified(hook)
    raise SystemExit("a difference between ranks was not found")
except NumericError as error:
    assert "biases differ between ranks" in str(error), error
dist.destroy_process_group()
"""


def test_one_all_reduce_for_all_layers_and_differences_between_ranks_are_found(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(40000 + os.getpid() % 20000), "WORLD_SIZE": "2"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(script)], env=environment(**store, RANK=str(r)), cwd=ROOT, stderr=subprocess.PIPE
        )
        for r in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=60)
        assert worker.returncode == 0, errors.decode()[-3000:]
