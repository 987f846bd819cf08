"""`collectives`: what the two hooks add to a step, counted where torch dispatches communication."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe.bias_hook import ExpertBiasConfig, ExpertBiasHook
from moe.model import MoEDecoder
from reweighting.hook import SampleReweightConfig, SampleReweightHook
from tests.bench.group import join_process_group
from tests.bench.hooks import MODEL, VOCAB
from tests.bench.report import Report
from tests.moe.test_bias_hook import APPLIED, Records, run_of, step_of
from trainer.accumulate import Accumulator
from trainer.data.loader import MicroBatch
from trainer.engine_config import EngineConfig
from trainer.hooks import HookList


class Collectives(TorchDispatchMode):
    """Counts what reaches a process group."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.namespace == "c10d"
        return function(*args, **(kwargs or {}))


class LocalEngine:
    """As much of the engine as accumulation needs, without the engine's own collectives."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.config = EngineConfig()

    def forward(self, tokens_bT: torch.Tensor, labels_bT: torch.Tensor, documents_bT: torch.Tensor) -> Any:
        return self.module(tokens_bT, labels_bT, documents_bT)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()


def measure(report: Report) -> None:
    """Collectives of one step with both hooks, in a group of one rank: how many there are does not depend on ranks."""
    torch.manual_seed(0)
    join_process_group()
    model = MoEDecoder(MODEL, vocab_size=VOCAB)
    bias, weights = ExpertBiasHook(ExpertBiasConfig()), SampleReweightHook(SampleReweightConfig())
    for hook in (bias, weights):
        hook.on_start(run_of(model))
    accumulator = Accumulator(
        LocalEngine(model),  # type: ignore[arg-type]
        HookList({"sample_reweight": weights}),
        mode="deferred", normalization="tokens", num_micro_batches=2, samples_per_row=1, device=torch.device("cpu"),
    )  # fmt: skip
    tokens = torch.randint(0, VOCAB, (2, 16))
    ids = torch.arange(2)
    batch = MicroBatch(ids, torch.zeros_like(ids), tokens, tokens, torch.zeros_like(tokens), ids)
    with Collectives() as losses_mode:
        accumulator.run([batch, batch], step=1, applied_steps=0, recorder=Records())
    with Collectives() as bias_mode:
        bias.after_step(step_of(Records()), APPLIED)
    counts = {"sample_losses": losses_mode.count, "bias": bias_mode.count}
    for name, count in counts.items():
        report.add(f"collectives/{name}", count)
    report.add("collectives/extra", sum(counts.values()))
