"""Held-out loss by domain, over all ranks.

Every held-out token counts once: rows are dealt to ranks in turn, and sums are taken in float64, so the
result does not depend on the number of ranks beyond rounding.

Shape letters: D domains.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer import ranks
from trainer.data.corpus import TokenCorpus


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When and on how much to measure held-out loss."""

    every: int = 500
    """Steps between evaluations; 0 evaluates only before the first step and after the last."""
    max_rows: int = 0
    """Held-out rows of each domain to use, the first ones; 0 uses all."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        if self.every < 0:
            found.append(f"every: {self.every} is negative; use 0 for first and last only")
        if self.max_rows < 0:
            found.append(f"max_rows: {self.max_rows} is negative; use 0 for all")
        return found


@dataclass(frozen=True)
class HeldoutLoss:
    """Sums over the held-out split."""

    domain_names: tuple[str, ...]
    loss_sum_D: Tensor  # float64
    tokens_D: Tensor  # float64

    @property
    def tokens(self) -> int:
        return int(self.tokens_D.sum())

    def metrics(self) -> dict[str, float]:
        """`eval/loss`, `eval/ppl` over all tokens, `eval/<domain>/ppl` for each domain that has held-out text."""
        found = {"eval/loss": _ratio(self.loss_sum_D.sum(), self.tokens_D.sum())}
        found["eval/ppl"] = _exp(found["eval/loss"])
        for name, loss_sum, tokens in zip(self.domain_names, self.loss_sum_D, self.tokens_D, strict=True):
            if tokens > 0:
                found[f"eval/{name}/ppl"] = _exp(_ratio(loss_sum, tokens))
        return found


def evaluate(
    model: nn.Module,
    corpus: TokenCorpus,
    config: EvaluationConfig,
    *,
    batch_size: int,
    device: torch.device,
    sharing: int = 1,
    after_domain: Callable[[int], None] | None = None,
) -> HeldoutLoss:
    """Mean cross-entropy of the held-out split. Every rank calls it; the model's mode is restored.

    `sharing`: consecutive ranks that work on the same rows, each of which counts once.
    `after_domain` is told each domain's number once its rows have been forwarded.
    """
    sums_2D = torch.zeros(2, len(corpus.domain_names), dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for domain in range(len(corpus.domain_names)):
                num_rows = corpus.heldout_rows(domain)
                num_rows = min(num_rows, config.max_rows) if config.max_rows else num_rows
                stride = batch_size * ranks.world_size() // sharing
                # Every rank forwards equally often, with padding where rows run out: a model may communicate.
                for first in range(0, num_rows, stride):
                    start = min(first + ranks.rank() // sharing * batch_size, num_rows)
                    rows = corpus.heldout_batch(domain, start, min(start + batch_size, num_rows), at_least=1)
                    labels_BT = rows.labels_ST.to(device)
                    losses_BT = model(rows.tokens_ST.to(device), labels_BT, rows.documents_ST.to(device))
                    sums_2D[0, domain] += losses_BT.double().sum()
                    sums_2D[1, domain] += (labels_BT >= 0).sum()
                if after_domain is not None:
                    after_domain(domain)
    finally:
        model.train(was_training)
    if ranks.rank() % sharing:
        sums_2D.zero_()
    ranks.all_reduce_(sums_2D)
    loss_sum_D, tokens_D = sums_2D.cpu()
    return HeldoutLoss(corpus.domain_names, loss_sum_D, tokens_D)


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    return float(numerator / denominator) if denominator > 0 else math.nan


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
