"""Prints how far, in bf16, the gradient of eight micro-batches spread over ranks is from the sum of theirs.

A line for each ZeRO stage and type gradients are reduced in: `<stage> <type> <norm of the difference over the norm>`.
"""

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer import ranks
from trainer.engine import Engine
from trainer.engine_config import EngineConfig
from trainer.optim import OptimizerConfig, build_adamw
from trainer.process_group import leave, start_process_group, stop_process_group

MICRO_BATCHES = 8
OPTIMIZER = OptimizerConfig(clip_norm=0.0)


class Regression(nn.Module):
    """Squared errors of a network of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False)

    def forward(self, inputs_BX: Tensor, targets_BX: Tensor, _: Tensor) -> Tensor:
        return (self.second(F.silu(self.first(inputs_BX))) - targets_BX).float().square().mean(-1)


def model() -> Regression:
    torch.manual_seed(0)
    return Regression().bfloat16()


def error(config: EngineConfig, inputs_MBX: Tensor, targets_MBX: Tensor) -> float:
    """Of what Adam has seen: its first moment after one step is (1 - beta1) times the gradient."""
    exact = model()
    sums = {name: torch.zeros(p.numel(), dtype=torch.float64) for name, p in exact.named_parameters()}
    for inputs_BX, targets_BX in zip(inputs_MBX, targets_MBX, strict=True):
        (exact(inputs_BX, targets_BX, inputs_BX).mean() / MICRO_BATCHES).backward()
        for name, parameter in exact.named_parameters():
            assert parameter.grad is not None
            sums[name] += parameter.grad.flatten().double()
            parameter.grad = None
    mine = range(ranks.rank(), MICRO_BATCHES, ranks.world_size())
    ours = model()
    engine = Engine(
        ours, build_adamw(ours, OPTIMIZER, torch.device("cpu")), config, micro_batch_size=1, clip_norm=0.0
    )  # fmt: skip
    for number in mine:
        losses_B = engine.forward(inputs_MBX[number], targets_MBX[number], inputs_MBX[number])
        engine.backward(losses_B.mean() / MICRO_BATCHES, last=number == mine[-1])  # type: ignore[union-attr]
    engine.step(1e-4)
    off = sum(
        ((f.exp_avg.double() / (1 - OPTIMIZER.beta1)) - sums[f.name][f.start : f.stop]).square().sum()
        for f in engine.state.fragments()
    )
    total = ranks.all_reduce_(torch.as_tensor(off, dtype=torch.float64), "sum")
    return float((total / sum(each.square().sum() for each in sums.values())).sqrt())


if __name__ == "__main__":
    start_process_group(60)
    torch.manual_seed(5)
    batches = [torch.randn(MICRO_BATCHES, 32, 64).bfloat16() for _ in range(2)]
    for stage in (1, 2, 3):
        for kind in ("bf16", "fp32"):
            config = EngineConfig(zero_stage=stage, precision="bf16", reduce_dtype=kind)  # type: ignore[arg-type]
            found = error(config, *batches)
            if ranks.is_main():
                sys.stdout.write(f"{stage} {kind} {found}\n")
    stop_process_group()
    leave(0)
