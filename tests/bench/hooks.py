"""`hooks`: the optimizer step of a small model with each hook's work against the step without."""

import torch

from moe.bias_hook import ExpertBiasConfig, ExpertBiasHook
from moe.config import ModelConfig
from moe.model import MoEDecoder
from reweighting.strategies import STRATEGIES
from reweighting.weighing import sample_weights
from tests.bench.report import Report
from tests.bench.timing import interleaved
from tests.moe.test_bias_hook import APPLIED, Records, run_of, step_of

MODEL = ModelConfig(
    hidden_size=256, num_layers=4, num_dense_layers=1, dense_intermediate_size=704, num_heads=8, num_kv_heads=4,
    num_experts=16, top_k=2, expert_intermediate_size=256, num_shared_experts=1,
)  # fmt: skip
VOCAB, MICRO_BATCHES = 4096, 4


def measure(report: Report, rounds: int = 9) -> None:
    """Step time with the bias hook, and of the accumulation modes that sample weights need, over a plain step."""
    torch.manual_seed(0)
    model = MoEDecoder(MODEL, vocab_size=VOCAB)
    hook = ExpertBiasHook(ExpertBiasConfig())
    hook.on_start(run_of(model))
    batches = [torch.randint(0, VOCAB, (4, 128)) for _ in range(MICRO_BATCHES)]
    samples = sum(len(tokens) for tokens in batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def losses(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens, tokens).mean(dim=1)

    def finish() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def plain(move_bias: bool = False) -> None:
        for tokens in batches:
            (losses(tokens).sum() / samples).backward()
        finish()
        if move_bias:
            hook.after_step(step_of(Records()), APPLIED)
        else:
            model.take_counts("train")

    def weights(found: list[torch.Tensor]) -> list[torch.Tensor]:
        all_losses = torch.cat([loss.detach() for loss in found])
        valid = torch.ones(samples, dtype=torch.bool)
        return list(sample_weights(all_losses, valid, STRATEGIES["linupper"], alpha=1.0, temperature=1.0).split(4))

    def deferred() -> None:
        graphs = [losses(tokens) for tokens in batches]
        for loss, weight in zip(graphs, weights(graphs), strict=True):
            (loss * weight).sum().backward()
        finish()
        model.take_counts("train")

    def two_pass() -> None:
        with torch.no_grad():
            scored = [losses(tokens) for tokens in batches]
        for tokens, weight in zip(batches, weights(scored), strict=True):
            (losses(tokens) * weight).sum().backward()
        finish()
        model.take_counts("train")

    timed = interleaved(
        {"plain": plain, "bias": lambda: plain(move_bias=True), "deferred": deferred, "two_pass": two_pass},
        rounds=rounds,
    )
    for name in ("bias", "deferred", "two_pass"):
        report.add(
            f"hooks/{name}",
            timed[name].median / timed["plain"].median,
            timed[name].minimum / timed["plain"].minimum,
        )
