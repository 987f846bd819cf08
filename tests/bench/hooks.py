"""`hooks`: the optimizer step of a small model with each hook's work against the step without.

The bias hook is timed on a bare loop, so that its cost has the smallest step to hide in; the ways to accumulate that
sample weights need are timed on the real one (tests/bench/reweighting.py, whose table has errors and memory too).
"""

import statistics
import time

import torch

from moe.bias_hook import ExpertBiasConfig, ExpertBiasHook
from moe.config import ModelConfig
from moe.model import MoEDecoder
from tests.bench.report import Report
from tests.bench.reweighting import step_times
from tests.moe.test_bias_hook import APPLIED, Records, run_of, step_of

MODEL = ModelConfig(
    hidden_size=256, num_layers=4, num_dense_layers=1, dense_intermediate_size=704, num_heads=8, num_kv_heads=4,
    num_experts=16, top_k=2, expert_intermediate_size=256, num_shared_experts=1,
)  # fmt: skip
VOCAB, MICRO_BATCHES = 4096, 4
WAYS = ("deferred", "frozen", "two_pass")


def measure(report: Report, rounds: int = 7) -> None:
    """Step time with the bias hook over a plain step, and of each accumulation mode over unweighted training."""
    torch.manual_seed(0)
    model = MoEDecoder(MODEL, vocab_size=VOCAB)
    hook = ExpertBiasHook(ExpertBiasConfig())
    hook.on_start(run_of(model))
    batches = [torch.randint(0, VOCAB, (4, 128)) for _ in range(MICRO_BATCHES)]
    samples = sum(len(tokens) for tokens in batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    # The hook takes less than what two steps differ by, so its own time is set against that of the step around it.
    steps, moves = [], []
    for _ in range(rounds + 1):
        begin = time.process_time()
        for tokens in batches:
            (model(tokens, tokens).mean(dim=1).sum() / samples).backward()
        optimizer.step()
        optimizer.zero_grad()
        before_hook = time.process_time()
        hook.after_step(step_of(Records()), APPLIED)
        steps.append(before_hook - begin)
        moves.append(time.process_time() - before_hook)
    report.add(
        "hooks/bias", 1 + statistics.median(moves[1:]) / statistics.median(steps[1:]), 1 + min(moves) / min(steps)
    )
    times = step_times(("unweighted", *WAYS))
    for name in WAYS:
        of, to = times[name], times["unweighted"]
        report.add(f"hooks/{name}", of.median / to.median, of.minimum / to.minimum)
