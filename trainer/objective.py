"""What one optimizer step minimises: sample losses, their coefficients, and this rank's share of the sum.

    objective = sum_i c_i l_i + penalty,      sum_i c_i = 1 over all B samples of the step

A sample is a row, or, where a hook weighs documents, one document's part of a row. l_i is the mean cross-entropy of its
target tokens; with token weights v, l_i is sum_t v_t CE_t / n_i, and everything is divided by the mean of v over all
target tokens of the step. No rank ever normalises by something only it knows.

Shape letters: B samples of the step, s of a micro-batch, b rows of a micro-batch, U samples a row may hold, T sequence,
X features of a penalty.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trainer.data.loader import MicroBatch

Normalization = Literal["samples", "tokens"]

IGNORED_LABEL = -100


def loss_coefficients(
    tokens_B: Tensor, weights_B: Tensor | None, normalization: Normalization, factors_B: Tensor | None = None
) -> Tensor:
    """Factor c_i of each sample's mean loss in the objective, float64 [B]; they sum to one over valid samples.

    `samples`: c_i = w_i f_i / sum_j w_j f_j, every sample counts by its weight whatever its length.
    `tokens`: c_i = w_i f_i n_i / sum_j w_j f_j n_j, every token of a sample counts by the sample's weight.
    `factors_B`: the factor f of each sample's domain, 1 by default. Without weights w_i is uniform. Samples without a
    target token count for nothing, whatever their weight; if no sample has any, all are zero.
    """
    share_B = coefficient_numerators(tokens_B, weights_B, normalization, factors_B)
    total = share_B.sum()
    return torch.where(total > 0, share_B / total.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def coefficient_numerators(
    tokens_B: Tensor, weights_B: Tensor | None, normalization: Normalization, factors_B: Tensor | None
) -> Tensor:
    """The coefficients before they are divided by their sum over the step, float64 [B]."""
    has_tokens_B = tokens_B > 0
    share_B = has_tokens_B.double() if weights_B is None else torch.where(has_tokens_B, weights_B.double(), 0.0)
    if normalization == "tokens":
        share_B = share_B * tokens_B
    return share_B if factors_B is None else share_B * factors_B.double()


class SampleSplit(NamedTuple):
    """The samples of one micro-batch: which target token belongs to which."""

    counted_bT: Tensor  # bool, target tokens
    parts_bT: Tensor | None  # int64 in [0, U), the sample within the row; None where every row is one sample
    samples_per_row: int

    @classmethod
    def of(cls, batch: MicroBatch, samples_per_row: int) -> "SampleSplit":
        """Rows as samples if `samples_per_row` is 1, else the documents of each row in turn."""
        counted_bT = batch.labels_bT != IGNORED_LABEL
        if samples_per_row == 1:
            return cls(counted_bT, None, 1)
        is_new_bT = torch.zeros_like(batch.documents_bT)
        is_new_bT[:, 1:] = batch.documents_bT[:, 1:] != batch.documents_bT[:, :-1]
        # Padding makes one part more; it has no targets, so where it is counted does not matter.
        return cls(counted_bT, is_new_bT.cumsum(1).clamp(max=samples_per_row - 1), samples_per_row)

    def sums(self, values_bT: Tensor) -> Tensor:
        """Sum of per-token values over each sample, [s]; differentiable."""
        if self.parts_bT is None:
            return values_bT.sum(dim=1)
        sums_bU = values_bT.new_zeros(len(values_bT), self.samples_per_row)
        return sums_bU.scatter_add(1, self.parts_bT, values_bT).flatten()

    def tokens(self) -> Tensor:
        """Target tokens of each sample, int64 [s]."""
        return self.sums(self.counted_bT.long())

    def spread(self, values_b: Tensor) -> Tensor:
        """A value of each row as the value of each of its samples, [s]."""
        return values_b.repeat_interleave(self.samples_per_row)


class Objective:
    """One step's objective as a sum over micro-batches: turns what a forward gave into this rank's share."""

    def __init__(self, num_rows: int, penalty_X: Tensor | None) -> None:
        """`num_rows`: rows of the whole step; `penalty_X`: coefficients of the model's penalty features, or None."""
        self.penalty: Tensor | None = None
        """Value of the penalty so far, on this rank."""
        self._num_rows = num_rows
        self._penalty_X = penalty_X

    def share(self, losses_s: Tensor, coefficients_s: Tensor, features_bX: Tensor | None) -> Tensor:
        """sum of c l over a micro-batch, plus its part of the penalty; a scalar to differentiate."""
        share = (losses_s * coefficients_s.to(losses_s.dtype)).sum()
        if features_bX is not None and self._penalty_X is not None:
            penalty = (features_bX @ self._penalty_X).sum() / self._num_rows
            self.penalty = penalty.detach() if self.penalty is None else self.penalty + penalty.detach()
            share = share + penalty
        return share
