"""Ten steps of a tiny model with both hooks, once for each set of optimisations, in one process group.

`torchrun ... -m tests.dist.golden VARIANTS OUT`: VARIANTS is JSON, a list of [overrides of golden.yaml, experts in C++];
rank 0 writes the losses of each into OUT.

`python -m tests.dist.golden` writes golden_losses.json: the losses of plain torch on the whole batch. They may change
only where the mathematics of training is meant to.

The text is made of integers alone, so that neither a tokenizer nor a file stands between the seed and the losses.
"""

import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import moe.router
from configs.loader import load_run_config
from configs.schema import RunConfig
from launch.train import build
from moe import native
from tests.dist.reference import train_reference
from trainer import ranks
from trainer.accumulate import Accumulator
from trainer.data.corpus import Rows
from trainer.data.loader import MicroBatch
from trainer.hooks import StepResult
from trainer.metrics import MetricBuffer
from trainer.process_group import leave, start_process_group, stop_process_group
from trainer.schedule import learning_rate

CONFIG = Path(__file__).with_suffix(".yaml")
GOLDEN = Path(__file__).with_name("golden_losses.json")
VOCAB = 64


class MadeText:
    """Each next token is one of four that follow from the last one: there is something to learn, more or less of it.

    As much of a TokenCorpus as training needs.
    """

    vocab_size, documents_per_row = VOCAB, 1
    domain_names, domain_shares = ("made",), (1.0,)

    def __init__(self, length: int) -> None:
        self._length = length

    def train_batch(self, samples_S: Any) -> Rows:
        rows_SU = np.empty((len(samples_S), self._length + 1), dtype=np.int64)
        for row_U, sample in zip(rows_SU, samples_S, strict=True):
            drawn_U = np.random.RandomState(int(sample)).randint(0, 1 + int(sample) % 4, len(row_U))
            row_U[0] = sample % VOCAB
            for i in range(1, len(row_U)):
                row_U[i] = (5 * row_U[i - 1] + 17 + drawn_U[i]) % VOCAB
        tokens_SU = torch.from_numpy(rows_SU)
        nothing_S = torch.zeros(len(samples_S), dtype=torch.int64)
        return Rows(
            tokens_SU[:, :-1].contiguous(), tokens_SU[:, 1:].contiguous(), nothing_S,
            torch.zeros_like(tokens_SU[:, 1:]),
        )  # fmt: skip

    def excerpts(self, samples: Sequence[tuple[int, int | None]]) -> list[str]:
        return [""] * len(samples)


class Plain(NamedTuple):
    """What plain torch makes of golden.yaml on the whole batch: experts in Python, all logits, AdamW unfused."""

    losses: list[float]
    margin: float
    """Least distance between a token's last chosen biased score and the first one left out."""


def plain(*overrides: str) -> Plain:
    """The reference, with everything off that can be."""
    config = load_run_config(CONFIG, overrides)
    margins: list[float] = []
    compiled, select = native.available, moe.router._top_experts

    def watched(biased_NE: torch.Tensor, *, top_k: int, **groups: int) -> torch.Tensor:
        best_NK = biased_NE.topk(top_k + 1, dim=-1).values
        margins.append(float((best_NK[:, -2] - best_NK[:, -1]).min()))
        return select(biased_NE, top_k=top_k, **groups)

    native.available, moe.router._top_experts = lambda: False, watched  # type: ignore[assignment]
    try:
        losses = train_reference(config, MadeText(config.train.sequence_length)).losses  # type: ignore[arg-type]
    finally:
        native.available, moe.router._top_experts = compiled, select
    return Plain(losses, min(margins))


def losses_of(config: RunConfig) -> list[float]:
    """The loss of every step by the engine, the accumulator and the hooks that `config` asks for."""
    corpus, train = MadeText(config.train.sequence_length), config.train
    engine, hooks, run = build(config, corpus, Path(config.folder))  # type: ignore[arg-type]
    world, share = (config.engine.data_parallel(number) for number in (ranks.world_size(), ranks.rank()))
    num_micro_batches = train.global_batch_size // (train.micro_batch_size * world)
    mode = train.mode(needs_whole_step=hooks.needs_batch_losses, keeps_graphs=config.engine.keeps_graphs)
    accumulator = Accumulator(
        engine, hooks, mode=mode, normalization=train.loss_normalization, num_micro_batches=num_micro_batches,
        samples_per_row=run.samples_per_row, device=run.device,
    )  # fmt: skip
    found = []
    for step in range(train.steps):
        batches = []
        for m in range(num_micro_batches):
            first = step * train.global_batch_size + (m * world + share) * train.micro_batch_size
            ids_b = torch.arange(first, first + train.micro_batch_size)
            rows = corpus.train_batch(ids_b.numpy())
            nothing_b = torch.zeros_like(ids_b)
            batches.append(
                MicroBatch(ids_b, rows.domains_S, rows.tokens_ST, rows.labels_ST, rows.documents_ST, nothing_b)
            )
        done = accumulator.run(batches, step=step + 1, applied_steps=step, recorder=MetricBuffer())
        rate = learning_rate(config.schedule, step, peak=config.optimizer.learning_rate, total_steps=train.steps)
        applied, _ = engine.step(rate, done.gradient_scale)
        assert applied
        hooks.after_step(done.context, StepResult(applied=True, reason=""))
        accumulator.budget.settle()
        assert done.loss is not None
        found.append(done.loss)
    return found


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) == 1:
        GOLDEN.write_text(json.dumps({"losses": plain().losses}, indent=1) + "\n")
        return
    start_process_group(60)
    compiled, found = native.available, []
    for overrides, in_cpp in json.loads(sys.argv[1]):
        native.available = compiled if in_cpp else lambda: False  # type: ignore[assignment]
        assert native.available() == in_cpp, "the C++ experts are not built: make setup"
        found.append(losses_of(load_run_config(CONFIG, overrides, world_size=ranks.world_size())))
        gc.collect()  # engines are cycles
    if ranks.is_main():
        Path(sys.argv[2]).write_text(json.dumps(found))
    stop_process_group()


if __name__ == "__main__":
    main()
    leave(0)
