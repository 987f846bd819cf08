"""Experts spread over ranks equal experts on one rank, whatever the loads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT, environment

SCRIPT = """
import sys, torch, torch.distributed as dist
from moe.expert_parallel import parallel_experts_forward
from moe.grouped import experts_forward

dist.init_process_group("gloo")
rank, world, case = dist.get_rank(), dist.get_world_size(), sys.argv[1]
torch.manual_seed(0)
E, K, D, F = 8, 2, 16, 8
tokens = {"no token on rank 1": [12, 0], "no token at all": [0, 0]}.get(case, [12, 7])
xs = [torch.randn(n, D) for n in tokens]
scores = [torch.rand(n, E) for n in tokens]
if case == "all experts of rank 0":
    scores = [s + torch.tensor([9.0] * 4 + [0.0] * 4) for s in scores]
if case == "one expert has everything":
    scores = [s + torch.tensor([0.0] * 5 + [9.0] + [0.0] * 2) for s in scores]
indices = [s.topk(K).indices for s in scores]
gates = [torch.rand(n, K) for n in tokens]
gate_up, down = torch.randn(E, D, 2 * F), torch.randn(E, F, D)
cotangents = [torch.randn(n, D) for n in tokens]

whole = [torch.cat(xs), torch.cat(gates), gate_up, down]
whole = [t.clone().requires_grad_() for t in whole]
expected = experts_forward(whole[0], torch.cat(indices), whole[1], whole[2], whole[3])
expected.backward(torch.cat(cotangents))

share = slice(rank * E // world, (rank + 1) * E // world)
own = [xs[rank], gates[rank], gate_up[share], down[share]]
own = [t.clone().requires_grad_() for t in own]
found = parallel_experts_forward(own[0], indices[rank], own[1], own[2], own[3], dist.group.WORLD)
found.backward(cotangents[rank])

rows = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
close(found, expected[rows])
close(own[0].grad, whole[0].grad[rows])
close(own[1].grad, whole[1].grad[rows])
close(own[2].grad, whole[2].grad[share])
close(own[3].grad, whole[3].grad[share])
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    "case",
    ["mixed", "all experts of rank 0", "one expert has everything", "no token on rank 1", "no token at all"],
)
def test_outputs_and_gradients_equal_one_rank(case: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000), "WORLD_SIZE": "2"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), case],
            env=environment(**store, RANK=str(rank)),
            cwd=ROOT,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=60)
        assert worker.returncode == 0, errors.decode()[-3000:]
