"""`gpu/loss_head`: losses and gradients of our output head in bf16 against the plain head, Liger's and cut-cross-entropy's.

The gradients of the token losses are weights that are known only after the forward, as `deferred` needs them: an
implementation that cannot do that fails the comparison and is listed as not run.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.bench.loss_head import Head
from tests.bench.report import Report
from tests.bench.timing import interleaved, stopwatch

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Hidden states [N, D], weight [V, D] and labels [N] to losses [N]."""


class Size(NamedTuple):
    """Of the head, and how many tokens it is given at once."""

    vocab: int = 131_072
    width: int = 2048
    tokens: int = 8192


class _KernelHead(nn.Module):
    """The weight of a head, under somebody else's function."""

    def __init__(self, weight: nn.Parameter, kernel: Kernel) -> None:
        super().__init__()
        self.weight, self._kernel = weight, kernel

    def forward(self, hidden_ND: Tensor, labels_N: Tensor) -> Tensor:
        return self._kernel(hidden_ND, self.weight, labels_N).float()


def _liger() -> Kernel:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def kernel(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
        losses_N: Tensor = liger_fused_linear_cross_entropy(
            hidden_ND, weight_VD, labels_N, reduction="none", accum_dtype=torch.float32
        )
        return losses_N

    return kernel


def _cut_cross_entropy() -> Kernel:
    from cut_cross_entropy import linear_cross_entropy

    def kernel(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
        losses_N: Tensor = linear_cross_entropy(hidden_ND, weight_VD, labels_N, reduction="none")
        return losses_N

    return kernel


KERNELS: dict[str, Callable[[], Kernel]] = {"liger": _liger, "cut_cross_entropy": _cut_cross_entropy}


def measure(
    report: Report, device: torch.device, *, size: Size | None = None, rounds: int = 10, warm_up: int = 2
) -> None:
    """Time over the plain head's, kernels' time over ours, and on a GPU the memory that a pass adds."""
    vocab, width, tokens = size = size or Size()

    def head(tile: int) -> Head:
        return Head(tile, width, tokens, vocab=vocab, device=device, dtype=torch.bfloat16)

    heads = {"plain": head(vocab), "ours": head(0)}
    plain_results = [tensor.detach() for tensor in heads["plain"].run()]
    _check(heads["ours"], plain_results)
    for name, load in KERNELS.items():
        key = f"gpu/loss_head/peer/{name}"
        try:
            peer = head(0)
            peer.module = _KernelHead(peer.module.weight, load())  # type: ignore[assignment]
            _check(peer, plain_results)
        except Exception as error:  # it is not there, cannot run, or computes something else
            report.not_run(key, error)
        else:
            heads[name] = peer
    times = interleaved(
        {name: each.run for name, each in heads.items()}, rounds=rounds, warm_up=warm_up, watch=stopwatch(device)
    )
    ours = times.pop("ours")
    shape = f"V {vocab}, width {width}, {tokens} tokens, {1e3 * ours.median:.2f} ms"
    for name, timing in times.items():
        if name == "plain":
            report.add(
                "gpu/loss_head/time_ratio", ours.median / timing.median, ours.minimum / timing.minimum, note=shape
            )
        else:
            report.add(f"gpu/loss_head/peer/{name}", timing.median / ours.median, timing.minimum / ours.minimum)
    if device.type != "cuda":
        report.not_run("gpu/loss_head/memory_ratio", "counted by the GPU's allocator only")
        return
    added = {name: _memory_added(heads[name].run) for name in ("ours", "plain")}
    note = f"{added['ours'] / 2**20:.0f} MiB, plain {added['plain'] / 2**20:.0f} MiB"
    report.add("gpu/loss_head/memory_ratio", added["ours"] / added["plain"], note=note)


def _check(head: Head, plain_results: list[Tensor]) -> None:
    names = ("losses", "gradient of the hidden states", "gradient of the weight")
    for what, mine, plain in zip(names, head.run(), plain_results, strict=True):
        error = ((mine.float() - plain.float()).norm() / plain.float().norm()).item()
        if not error < 2e-2:
            raise AssertionError(f"{what} differ from the plain head's by {error:.1e}")


def _memory_added(run: Callable[[], object]) -> int:
    """Bytes that a pass needs at most beside what is there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
