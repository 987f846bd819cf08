"""`gpu/loss_head`: losses and gradients of our head in bf16 against the plain one, Liger's and cut-cross-entropy's.

The gradients of the token losses are weights that are known only after the forward, as `deferred` needs them: an
implementation that cannot do that fails the comparison and is listed as not run.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.loss_head import OutputHead
from tests.bench.report import Report
from tests.bench.timing import interleaved, stopwatch

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Hidden states [N, D], weight [V, D] and labels [N] to losses [N]."""


class Size(NamedTuple):
    """Of the head, and how many tokens it is given at once."""

    vocab: int = 131_072
    width: int = 2048
    tokens: int = 8192


class Head:
    """Hidden states, weight and labels, the same for everybody, under one function."""

    def __init__(self, size: Size, device: torch.device, losses: Kernel | None = None) -> None:
        """`losses`: somebody's function; None for our module's."""
        torch.manual_seed(0)
        with device:
            module = OutputHead(size.width, size.vocab, loss_tile=0).bfloat16()
            self.hidden_ND = torch.randn(size.tokens, size.width).bfloat16().requires_grad_()
            self.labels_N = torch.randint(0, size.vocab, (size.tokens,))
            self.weights_N = torch.rand(size.tokens)
        self.weight = module.weight
        self._losses = losses or (lambda hidden_ND, weight, labels_N: module(hidden_ND, labels_N))

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, and the gradients of hidden states and weight under weights that come after the forward."""
        losses_N = self._losses(self.hidden_ND, self.weight, self.labels_N)
        weights_N = self.weights_N.to(losses_N.dtype)
        return losses_N.detach(), *torch.autograd.grad(losses_N, [self.hidden_ND, self.weight], weights_N)


def _plain(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_ND, weight_VD).float(), labels_N, reduction="none")


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
    size = size or Size()
    heads = {"plain": Head(size, device, _plain), "ours": Head(size, device)}
    expected = heads["plain"].run()
    _check(heads["ours"], expected)
    for name, load in KERNELS.items():
        try:
            peer = Head(size, device, load())
            _check(peer, expected)
        except Exception as error:  # it is not there, cannot run, or computes something else
            report.not_run(f"gpu/loss_head/peer/{name}", error)
        else:
            heads[name] = peer
    times = interleaved(
        {name: each.run for name, each in heads.items()}, rounds=rounds, warm_up=warm_up, watch=stopwatch(device)
    )
    ours = times.pop("ours")
    plain = times.pop("plain")
    note = f"V {size.vocab}, width {size.width}, {size.tokens} tokens, {1e3 * ours.median:.2f} ms"
    report.add("gpu/loss_head/time_ratio", ours.median / plain.median, ours.minimum / plain.minimum, note=note)
    for name, timing in times.items():
        report.add(f"gpu/loss_head/peer/{name}", timing.median / ours.median, timing.minimum / ours.minimum)
    if device.type != "cuda":
        report.not_run("gpu/loss_head/memory_ratio", "counted by the GPU's allocator only")
        return
    added = {name: _memory_added(heads[name].run) for name in ("ours", "plain")}
    note = f"{added['ours'] / 2**20:.0f} MiB, plain {added['plain'] / 2**20:.0f} MiB"
    report.add("gpu/loss_head/memory_ratio", added["ours"] / added["plain"], note=note)


def _check(head: Head, expected: tuple[Tensor, ...]) -> None:
    names = ("losses", "gradient of the hidden states", "gradient of the weight")
    for what, mine, plain in zip(names, head.run(), expected, strict=True):
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
