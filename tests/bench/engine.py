"""`engine`: the step under DeepSpeed, at each ZeRO stage, against the same step in plain torch.

One process, one micro-batch a step, fused AdamW and clipping in all; what is timed is the engine's own work around the
same forward and backward.
"""

import copy

import torch
from torch import nn

from moe.model import MoEDecoder
from tests.bench.group import join_process_group
from tests.bench.hooks import MODEL, VOCAB
from tests.bench.report import Report
from tests.bench.timing import interleaved
from trainer.engine import Engine
from trainer.engine_config import EngineConfig
from trainer.optim import OptimizerConfig, build_adamw

STAGES = (0, 1, 2, 3)
OPTIMIZER = OptimizerConfig(learning_rate=1e-4)
CPU = torch.device("cpu")


def measure(report: Report, rounds: int = 5) -> None:
    """Ratio of a step's CPU time, DeepSpeed's over plain torch's."""
    torch.manual_seed(0)
    model = MoEDecoder(MODEL, vocab_size=VOCAB)
    tokens_BT = torch.randint(0, VOCAB, (4, 128))
    documents_BT = torch.zeros_like(tokens_BT)
    join_process_group()
    steps = {"torch": _plain(copy.deepcopy(model), tokens_BT, documents_BT)}
    steps |= {f"zero_{s}": _engine(copy.deepcopy(model), s, tokens_BT, documents_BT) for s in STAGES}
    losses = {name: [step() for _ in range(3)] for name, step in steps.items()}
    assert all(torch.allclose(torch.tensor(of), torch.tensor(losses["torch"]), rtol=1e-5) for of in losses.values())
    times = interleaved(dict(steps), rounds=rounds)
    for stage in STAGES:
        of, to = times[f"zero_{stage}"], times["torch"]
        report.add(f"engine/zero_{stage}", of.median / to.median, of.minimum / to.minimum)


def _plain(model: nn.Module, tokens_BT: torch.Tensor, documents_BT: torch.Tensor):  # type: ignore[no-untyped-def]
    optimizer = build_adamw(model, OPTIMIZER, CPU)

    def step() -> float:
        loss = model(tokens_BT, tokens_BT, documents_BT).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def _engine(model: nn.Module, stage: int, tokens_BT: torch.Tensor, documents_BT: torch.Tensor):  # type: ignore[no-untyped-def]
    engine = Engine(
        model, build_adamw(model, OPTIMIZER, CPU), EngineConfig(zero_stage=stage, precision="fp32"),
        micro_batch_size=len(tokens_BT), clip_norm=OPTIMIZER.clip_norm,
    )  # fmt: skip

    def step() -> float:
        loss = engine.forward(tokens_BT, tokens_BT, documents_BT).mean()  # type: ignore[union-attr]
        engine.backward(loss, last=True)
        engine.step(OPTIMIZER.learning_rate)
        return float(loss)

    return step
