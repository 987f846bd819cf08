"""Balances recorded scores in one process group: argv[1] is a JSON list of cases, argv[2] the folder for the results.

Every router gets the recorded logits of its tokens instead of what the blocks before it computed, so that loads do not
depend on rounding: whatever the cut, they must come out the same, and the biases that follow from them to the last bit.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from moe.bias_hook import ExpertBiasConfig, ExpertBiasHook
from moe.config import ModelConfig
from moe.model import MoEDecoder
from trainer import ranks
from trainer.hooks import RunContext, StepContext, StepResult
from trainer.metrics import MetricBuffer
from trainer.process_group import leave, start_process_group, stop_process_group

STEPS, BATCH, LENGTH, VOCAB, WIDTH = 6, 16, 12, 40, 16
EXPERTS, TOP_K = (4, 8), 2


class Case(NamedTuple):
    """One rule in one cut."""

    rule: str
    expert_ranks: int
    recompute: bool
    accumulation: int

    @property
    def name(self) -> str:
        return f"{self.rule}-EP{self.expert_ranks}-{'recomputed' if self.recompute else 'kept'}-x{self.accumulation}"


def recorded_logits() -> list[Tensor]:
    """For each MoE layer [steps, B, T, E]: some experts are liked better than others, and tastes change."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for experts in EXPERTS:
        taste_SE = torch.randn(STEPS, experts, generator=generator).cumsum(0) * 0.2 + torch.linspace(-1, 1, experts)
        noise = torch.randn(STEPS, BATCH, LENGTH, experts, generator=generator)
        found.append(noise + taste_SE[:, None, None, :])
    return found


def labels() -> Tensor:
    """Targets [steps, B, T] with padding of another length in every sample."""
    generator = torch.Generator().manual_seed(8)
    labels_SBT = torch.randint(0, VOCAB, (STEPS, BATCH, LENGTH), generator=generator)
    length_B1 = torch.randint(3, LENGTH + 1, (BATCH, 1), generator=generator)
    return labels_SBT.masked_fill(torch.arange(LENGTH) >= length_B1, -100)


def replay(case: Case) -> dict[str, Tensor]:
    """Loads of every step and biases after it, of every layer."""
    torch.manual_seed(0)
    rank, world = ranks.rank(), ranks.world_size()
    config = ModelConfig(
        hidden_size=WIDTH, num_layers=3, num_dense_layers=0, dense_intermediate_size=16, num_heads=2, num_kv_heads=2,
        layer_experts=(EXPERTS[0], 0, EXPERTS[1]), num_experts=8, top_k=TOP_K, expert_intermediate_size=8,
        num_shared_experts=0, activation_recompute="block" if case.recompute else "none",
    )  # fmt: skip
    model = MoEDecoder(
        config, vocab_size=VOCAB, expert_parallel_size=case.expert_ranks, expert_parallel_rank=rank % case.expert_ranks
    )
    if case.expert_ranks > 1:
        firsts = range(0, world, case.expert_ranks)
        groups = [dist.new_group(list(range(first, first + case.expert_ranks))) for first in firsts]
        model.join_expert_group(groups[rank // case.expert_ranks])
    logits, labels_SBT = recorded_logits(), labels()
    now: list[Tensor] = []  # logits of the micro-batch that is forwarded, or recomputed, for each layer
    for i, layer in enumerate(model.moe_layers()):
        layer.router.weight.data.copy_(torch.eye(EXPERTS[i], WIDTH))  # products with 0 and 1 are exact

        def put(router: Any, inputs: tuple[Tensor, ...], i: int = i) -> tuple[Tensor, ...]:
            return torch.nn.functional.pad(now[i], (0, WIDTH - now[i].shape[1])), *inputs[1:]

        layer.router.register_forward_pre_hook(put)
    hook = ExpertBiasHook(ExpertBiasConfig(rule=case.rule, rate=0.01))  # type: ignore[arg-type]
    hook.on_start(
        RunContext(
            model=model, total_steps=STEPS, global_batch_size=BATCH, domain_names=("a",), domain_shares=(1.0,),
            run_dir=Path(), seed=0, device=torch.device("cpu"), samples_per_row=1, has_weights=False, is_frozen=False,
            excerpts=lambda samples: [],
        )
    )  # fmt: skip
    found, size = {}, BATCH // (world * case.accumulation)
    for step in range(STEPS):
        for micro in range(case.accumulation):
            first = (micro * world + rank) * size
            own = slice(first, first + size)
            now[:] = [layer[step, own].flatten(0, 1) for layer in logits]
            targets_BT = labels_SBT[step, own]
            if case.recompute:  # as a first pass without gradients does
                with torch.no_grad():
                    model(targets_BT.clamp(min=0), targets_BT)
            model(targets_BT.clamp(min=0), targets_BT).sum().backward()
        counts = [ranks.all_reduce_(stats.counts_E.clone()) for stats in model._stats["train"]]
        buffer = MetricBuffer()
        nothing_B = torch.zeros(BATCH, dtype=torch.int64)
        context = StepContext(
            step=step + 1, applied_steps=step, sample_ids_B=nothing_B, parts_B=nothing_B,
            domains_B=nothing_B, tokens_B=(labels_SBT[step] != -100).sum(1), losses_B=nothing_B.double(),
            own_S=nothing_B, recorder=buffer,
        )  # fmt: skip
        hook.after_step(context, StepResult(applied=True, reason=""))
        for i, layer in enumerate(model.moe_layers()):
            found[f"counts.{step}.{i}"] = counts[i]
            found[f"bias.{step}.{i}"] = layer.router.expert_bias_E.clone()
    assert hook._certificate is not None
    hook._certificate.verify(STEPS)
    return found


if __name__ == "__main__":
    start_process_group(60)
    for values in json.loads(sys.argv[1]):
        case = Case(*values)
        result = replay(case)
        if ranks.is_main():
            save_file(result, Path(sys.argv[2]) / f"{case.name}.safetensors")
    stop_process_group()
    leave(0)
