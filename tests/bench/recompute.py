"""`recompute`: time and memory of forward and backward under each policy of activation recomputation, over keeping all.

`python -m tests.bench.recompute POLICY` prints the MiB that one forward and backward adds to the memory in use, weights
and their gradients apart.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import torch

from moe.config import ModelConfig
from moe.model import MoEDecoder
from tests.bench.memory import memory_added
from tests.bench.report import Report
from tests.bench.timing import interleaved

POLICIES = ("none", "selective", "block")
MODEL = ModelConfig(
    hidden_size=256, num_layers=6, num_dense_layers=1, dense_intermediate_size=704, num_heads=8, num_kv_heads=4,
    head_dim=32, num_experts=16, top_k=2, expert_intermediate_size=256, num_shared_experts=1, qk_norm=True,
)  # fmt: skip
VOCAB, SEQUENCE = 512, 256


def step_of(policy: str) -> Callable[[int], list[torch.Tensor]]:
    """Forward and backward of so many rows: the losses and all gradients."""
    torch.manual_seed(0)
    model = MoEDecoder(replace(MODEL, activation_recompute=policy), vocab_size=VOCAB)  # type: ignore[arg-type]
    tokens_BT = torch.randint(0, VOCAB, (8, SEQUENCE))

    def step(rows: int) -> list[torch.Tensor]:
        model.zero_grad(set_to_none=False)
        losses_BT = model(tokens_BT[:rows], tokens_BT[:rows])
        losses_BT.mean().backward()
        model.take_loads("train")
        return [losses_BT.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    return step


def measure(report: Report, rounds: int = 5) -> None:
    """Ratios of each policy to keeping all; bits are compared before anything is timed."""
    steps = {policy: step_of(policy) for policy in POLICIES}
    kept = steps["none"](2)
    for policy in POLICIES[1:]:
        assert all(torch.equal(a, b) for a, b in zip(steps[policy](2), kept, strict=True)), policy
    times = interleaved({policy: lambda step=step: step(8) for policy, step in steps.items()}, rounds=rounds)
    memory = {}
    for policy in POLICIES:
        done = subprocess.run(
            [sys.executable, "-m", "tests.bench.recompute", policy], capture_output=True, text=True, check=True
        )
        memory[policy] = float(done.stdout)
    for policy in POLICIES[1:]:
        of, to = times[policy], times["none"]
        report.add(f"recompute/{policy}/time", of.median / to.median, of.minimum / to.minimum)
        report.add(
            f"recompute/{policy}/memory", memory[policy] / memory["none"],
            note=f"{memory[policy]:.0f} MiB, all kept {memory['none']:.0f} MiB",
        )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    step = step_of(sys.argv[1])
    sys.stdout.write(f"{memory_added(lambda: step(1), lambda: step(8))[0]:.1f}\n")
