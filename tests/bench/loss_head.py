"""`loss_head`: the head's losses and gradients against `F.cross_entropy`: in tiles at V = 128k, whole at V = 4k.

`python -m tests.bench.loss_head ours|plain VOCABULARY` prints the MiB that one forward and backward adds to the memory
in use, weight and its gradient apart, and the peak of the whole process.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.loss_head import OutputHead
from tests.bench.memory import memory_added, printed_by
from tests.bench.report import Report
from tests.bench.timing import interleaved

VOCAB, WIDTH, WIDE, TOKENS, MEMORY_TOKENS = 131_072, 512, 2048, 256, 2048
SMALL_VOCAB, SMALL_WIDTH, SMALL_TOKENS = 4096, 256, 1024


class Head:
    """One head with its input, and gradients of the token losses as sample weights would make them."""

    def __init__(self, name: str, width: int, tokens: int, vocab_size: int) -> None:
        torch.manual_seed(0)
        self.name = name
        self.module = OutputHead(width, vocab_size, loss_tile=0)
        self.hidden_ND = torch.randn(tokens, width, requires_grad=True)
        self.labels_N = torch.randint(0, vocab_size, (tokens,))
        self.weights_N = torch.rand(tokens)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, and gradients of hidden states and weight."""
        if self.name == "plain":
            losses_N = F.cross_entropy(self.module(self.hidden_ND), self.labels_N, reduction="none")
        else:
            losses_N = self.module(self.hidden_ND, self.labels_N)
        return losses_N, *torch.autograd.grad(losses_N, [self.hidden_ND, self.module.weight], self.weights_N)


def measure(report: Report, rounds: int = 2) -> None:
    """Ours over plain in memory and in time; losses and gradients are compared before anything is timed."""
    _measure_memory(report, "memory_ratio", VOCAB)
    _measure_memory(report, "whole_memory_ratio", SMALL_VOCAB)
    _measure_time(report, "time_ratio", WIDTH, TOKENS, VOCAB, rounds)
    _measure_time(report, "time_ratio_wide", WIDE, TOKENS // 2, VOCAB, rounds)
    _measure_time(report, "whole_time_ratio", SMALL_WIDTH, SMALL_TOKENS, SMALL_VOCAB, 6 * rounds)


def _measure_memory(report: Report, key: str, vocab_size: int) -> None:
    found = printed_by("tests.bench.loss_head", ["plain", "ours"], str(vocab_size))
    for name, printed in found.items():
        if isinstance(printed, str):
            report.not_run(f"loss_head/{key}", f"{name}: {printed}")
            return
    (plain, _), (ours, _) = found.values()
    note = f"{ours:.0f} MiB, plain {plain:.0f} MiB, {MEMORY_TOKENS} tokens"
    report.add(f"loss_head/{key}", ours / plain, note=note)


def _measure_time(report: Report, key: str, width: int, tokens: int, vocab_size: int, rounds: int) -> None:
    heads = {name: Head(name, width, tokens, vocab_size) for name in ("plain", "ours")}
    for ours, plain in zip(heads["ours"].run(), heads["plain"].run(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    times = interleaved({name: head.run for name, head in heads.items()}, rounds=rounds, warm_up=0)
    report.add(
        f"loss_head/{key}",
        times["ours"].median / times["plain"].median,
        times["ours"].minimum / times["plain"].minimum,
        note=f"V {vocab_size}, width {width}, {tokens} tokens",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    small, large = (Head(sys.argv[1], 64, tokens, int(sys.argv[2])) for tokens in (2, MEMORY_TOKENS))
    sys.stdout.write("{:.1f} {:.1f}\n".format(*memory_added(small.run, large.run)))
