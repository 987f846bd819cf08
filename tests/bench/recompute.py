"""`recompute`: time and memory of forward and backward under each policy of activation recomputation, over keeping all.

Memory is what tensors hold at the worst moment, as torch's allocator counts it, weights and their gradients apart: what
a process holds also depends on how its allocator cuts memory up.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile

from moe.config import ModelConfig
from moe.model import MoEDecoder
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


def peak_mib(step: Callable[[int], object]) -> float:
    """MiB of tensors at the worst moment of a step, those that were there before it apart."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step(8)
    assert trace.profiler is not None
    live = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak / 2**20


def measure(report: Report, rounds: int = 3) -> None:
    """Ratios of each policy to keeping all; bits are compared before anything is timed."""
    steps = {policy: step_of(policy) for policy in POLICIES}
    kept = steps["none"](2)
    for policy in POLICIES[1:]:
        assert all(torch.equal(a, b) for a, b in zip(steps[policy](2), kept, strict=True)), policy
    times = interleaved({policy: lambda step=step: step(8) for policy, step in steps.items()}, rounds=rounds)
    memory = {policy: peak_mib(step) for policy, step in steps.items()}
    for policy in POLICIES[1:]:
        of, to = times[policy], times["none"]
        report.add(f"recompute/{policy}/time", of.median / to.median, of.minimum / to.minimum)
        report.add(
            f"recompute/{policy}/memory", memory[policy] / memory["none"],
            note=f"{memory[policy]:.0f} MiB, all kept {memory['none']:.0f} MiB",
        )  # fmt: skip
