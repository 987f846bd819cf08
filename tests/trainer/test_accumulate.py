"""The coefficients of the objective, and what happens when in a step."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.collectives import LocalEngine
from tests.moe.test_bias_hook import Records
from trainer.accumulate import AccumulationMode, Accumulator
from trainer.data.loader import MicroBatch
from trainer.hooks import Hook, HookList, StepContext
from trainer.objective import SampleSplit, loss_coefficients


def test_known_coefficients() -> None:
    tokens_B = torch.tensor([10, 30, 0, 60])
    assert loss_coefficients(tokens_B, None, "samples").tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
    assert loss_coefficients(tokens_B, None, "tokens").tolist() == pytest.approx([0.1, 0.3, 0, 0.6])
    weights_B = torch.tensor([0.5, 0.25, 0.0, 0.25])
    assert loss_coefficients(tokens_B, weights_B, "samples").tolist() == pytest.approx([0.5, 0.25, 0, 0.25])
    assert loss_coefficients(tokens_B, weights_B, "tokens").tolist() == pytest.approx(
        [5 / 27.5, 7.5 / 27.5, 0, 15 / 27.5]
    )


def test_domain_factors_join_the_weights() -> None:
    tokens_B, factors_B = torch.tensor([10, 30, 0, 60]), torch.tensor([2.0, 1.0, 5.0, 0.0])
    assert loss_coefficients(tokens_B, None, "samples", factors_B).tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert loss_coefficients(tokens_B, None, "tokens", factors_B).tolist() == pytest.approx([0.4, 0.6, 0, 0])


def test_a_weight_of_a_sample_without_tokens_takes_nothing_from_the_others() -> None:
    tokens_B = torch.tensor([4, 0, 4, 0])
    for weights_B in (torch.full((4,), 0.25), torch.tensor([1.0, 5.0, 1.0, math.nan])):
        for by in ("samples", "tokens"):
            coefficients_B = loss_coefficients(tokens_B, weights_B, by)  # type: ignore[arg-type]
            assert coefficients_B.tolist() == [0.5, 0.0, 0.5, 0.0]


@given(
    tokens=st.lists(st.integers(0, 10_000), min_size=1, max_size=50),
    by=st.sampled_from(["samples", "tokens"]),
    has_weights=st.booleans(),
)
def test_coefficients_sum_to_one_or_are_all_zero(tokens: list[int], by: str, has_weights: bool) -> None:
    weights_B = torch.full((len(tokens),), 1 / len(tokens)) if has_weights else None
    coefficients_B = loss_coefficients(torch.tensor(tokens), weights_B, by)  # type: ignore[arg-type]
    assert coefficients_B.sum().item() == pytest.approx(float(any(tokens)))
    assert not coefficients_B[torch.tensor(tokens) == 0].any()


def test_token_normalisation_is_the_mean_over_all_tokens() -> None:
    losses_BT = torch.rand(4, 6, dtype=torch.float64)
    kept_BT = torch.rand(4, 6) < 0.5
    kept_BT[2] = False
    losses_BT = losses_BT * kept_BT
    split = SampleSplit(kept_BT, None, 1)
    means_B = split.sums(losses_BT) / split.tokens().clamp(min=1)
    objective = (loss_coefficients(split.tokens(), None, "tokens") * means_B).sum()
    assert objective.item() == pytest.approx(losses_BT[kept_BT].mean().item(), rel=1e-6)


class Diary(Hook):
    """Notes the events of a step among the forwards and backwards of the engine below."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_losses(self, step: StepContext) -> None:
        self.events.append("losses")

    def before_last_backward(self, step: StepContext) -> None:
        assert step.coefficients_B is not None
        self.events.append("sent")


class NotedEngine(LocalEngine):
    def __init__(self, diary: Diary, factor: float) -> None:
        super().__init__(torch.nn.Linear(1, 1))
        self._diary, self._factor = diary, factor

    def forward(self, tokens_bT: torch.Tensor, labels_bT: torch.Tensor, documents_bT: torch.Tensor) -> Any:
        self._diary.events.append("forward" if torch.is_grad_enabled() else "look")
        losses_bT1: torch.Tensor = self.module(tokens_bT.unsqueeze(-1).float())
        return losses_bT1.squeeze(-1) * self._factor

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self._diary.events.append("last" if last else "backward")
        super().backward(loss, last=last)


@pytest.mark.parametrize(
    ("mode", "events"),
    [
        ("streaming", "forward backward forward losses sent last"),
        ("deferred", "forward forward losses backward sent last"),
        ("two_pass", "look look losses forward backward forward sent last"),
    ],
)
def test_hooks_send_once_all_forwards_are_over(mode: AccumulationMode, events: str) -> None:
    assert events_of_step(mode, factor=1.0) == events.split()


@pytest.mark.parametrize("mode", ["streaming", "deferred", "two_pass"])
def test_nothing_is_sent_in_a_step_whose_losses_are_not_finite(mode: AccumulationMode) -> None:
    assert "sent" not in events_of_step(mode, factor=math.nan)


def events_of_step(mode: AccumulationMode, *, factor: float) -> list[str]:
    diary = Diary()
    engine = NotedEngine(diary, factor)
    engine.abandon = lambda loss: None  # type: ignore[attr-defined]
    accumulator = Accumulator(
        engine,  # type: ignore[arg-type]
        HookList({"diary": diary}),
        mode=mode, normalization="tokens", num_micro_batches=2, samples_per_row=1, device=torch.device("cpu"),
    )  # fmt: skip
    tokens_bT, ids_b = torch.arange(6).view(2, 3), torch.arange(2)
    rows = [MicroBatch(ids_b + 2 * m, ids_b * 0, tokens_bT, tokens_bT, tokens_bT * 0, ids_b) for m in range(2)]
    accumulator.run(rows, step=1, applied_steps=0, recorder=Records())
    return diary.events
