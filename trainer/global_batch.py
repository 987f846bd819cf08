"""The optimizer step as every rank sees it: one all-gather of a few numbers a sample.

Shape letters: B samples of the step, S samples of this rank, C columns, W ranks.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trainer import ranks
from trainer.data.loader import MicroBatch
from trainer.objective import SampleSplit

_SIGNALS, _BUSY = 4, 6  # the columns that are a rank's, not a sample's


class Signals(NamedTuple):
    """What a rank has to tell all others at a step: every rank hears of it at the same one."""

    stop: bool = False
    """It was asked to end the run."""
    save_failed: bool = False
    """The checkpoint under way could not be written."""

    @property
    def bits(self) -> int:
        """All of them in one number."""
        return sum(value << place for place, value in enumerate(self))

    @classmethod
    def of(cls, bits: int) -> "Signals":
        """The signals in a number made by `bits`."""
        return cls(*(bool(bits >> place & 1) for place in range(len(cls._fields))))


class GlobalBatch(NamedTuple):
    """All samples of the step, sorted by row number and by place within the row, the same on every rank."""

    sample_ids_B: Tensor
    parts_B: Tensor
    domains_B: Tensor
    tokens_B: Tensor
    signals: Tensor  # int64 scalar: bits of the signals of all ranks
    digest: Tensor  # int64 scalar: sum of 32 bits of every row's (sample, domain, row)
    values: dict[str, Tensor]  # float64 [B] each
    busy_W: Tensor  # float64, seconds each rank says it worked before it came here


def gather_step(
    batches: Sequence[MicroBatch],
    splits: Sequence[SampleSplit],
    tokens: Sequence[Tensor],
    values: Mapping[str, Sequence[Tensor]],
    *,
    signals: Signals,
    sharing: int = 1,
    busy_s: float = 0.0,
) -> GlobalBatch:
    """Every rank's samples of the step on every rank. `values`: named per-sample numbers of each micro-batch, [s].
    `busy_s`: what this rank has to tell the others about its time.

    `sharing`: consecutive ranks that have the same samples, each of which counts once; what is not finite on one of
    them is not finite.
    float64 holds ids up to 2^53 exactly, so one tensor and one collective carry all.
    """
    ids_S = torch.cat([split.spread(batch.sample_ids_b) for batch, split in zip(batches, splits, strict=True)])
    domains_S = torch.cat([split.spread(batch.domains_b) for batch, split in zip(batches, splits, strict=True)])
    per_row = splits[0].samples_per_row
    parts_S = torch.arange(per_row, device=ids_S.device).repeat(len(ids_S) // per_row)
    digests_S = torch.cat([split.spread(batch.digests_b) for batch, split in zip(batches, splits, strict=True)])
    columns = [ids_S, parts_S, domains_S, torch.cat(list(tokens)), torch.full_like(ids_S, signals.bits), digests_S]
    columns.append(torch.full_like(ids_S, busy_s, dtype=torch.float64))
    columns += [torch.cat(list(parts)).detach() for parts in values.values()]
    rows_WSC = ranks.all_gather(torch.stack([column.double() for column in columns], dim=1))
    signals_W, busy_W = rows_WSC[:, 0, _SIGNALS].long(), rows_WSC[:, 0, _BUSY]
    rows_BC = rows_WSC[::sharing].flatten(0, 1)
    if sharing > 1:
        is_finite_BC = rows_WSC.isfinite().unflatten(0, (-1, sharing)).all(dim=1).flatten(0, 1)
        rows_BC = torch.where(is_finite_BC, rows_BC, torch.nan)
    rows_BC = rows_BC[(rows_BC[:, 0] * per_row + rows_BC[:, 1]).argsort()]
    ids_B, parts_B, domains_B, tokens_B, _, digests_B, _, *rest = rows_BC.unbind(dim=1)
    return GlobalBatch(
        ids_B.long(),
        parts_B.long(),
        domains_B.long(),
        tokens_B.long(),
        _any_bits(signals_W),
        torch.where(parts_B == 0, digests_B, 0).long().sum(),
        dict(zip(values, rest, strict=True)),
        busy_W,
    )


def _any_bits(bits_W: Tensor) -> Tensor:
    """Bitwise or of all, int64 scalar."""
    places = torch.arange(len(Signals._fields), device=bits_W.device)
    return ((bits_W.unsqueeze(1) >> places & 1).amax(dim=0) << places).sum()
