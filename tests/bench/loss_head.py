"""`loss_head`: the head's losses and gradients in tiles of the vocabulary against the plain head, at V = 128k.

`python -m tests.bench.loss_head TILE` prints the MiB that one forward and backward adds to the memory in use, weight
and its gradient apart.
"""

import subprocess
import sys

import torch
from torch import Tensor

from moe.loss_head import OutputHead
from tests.bench.memory import memory_added
from tests.bench.report import Report
from tests.bench.timing import interleaved

VOCAB, WIDTH, WIDE, TOKENS, MEMORY_TOKENS = 131_072, 512, 2048, 512, 2048


class Head:
    """One head with its input, and gradients of the token losses as sample weights would make them."""

    def __init__(self, tile: int, width: int, tokens: int) -> None:
        torch.manual_seed(0)
        self.module = OutputHead(width, VOCAB, loss_tile=tile)
        self.hidden_ND = torch.randn(tokens, width, requires_grad=True)
        self.labels_N = torch.randint(0, VOCAB, (tokens,))
        self.weights_N = torch.rand(tokens)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, and gradients of hidden states and weight."""
        losses_N = self.module(self.hidden_ND, self.labels_N)
        return losses_N, *torch.autograd.grad(losses_N, [self.hidden_ND, self.module.weight], self.weights_N)


def measure(report: Report, rounds: int = 3) -> None:
    """Ours over plain in memory and in time; losses and gradients are compared before anything is timed."""
    found = {}
    for name, tile in (("plain", VOCAB), ("ours", 0)):
        done = subprocess.run(
            [sys.executable, "-m", "tests.bench.loss_head", str(tile)], capture_output=True, text=True, check=True
        )
        found[name] = float(done.stdout)
    report.add(
        "loss_head/memory_ratio",
        found["ours"] / found["plain"],
        note=f"{found['ours']:.0f} MiB, plain {found['plain']:.0f} MiB, {MEMORY_TOKENS} tokens",
    )
    for key, width, tokens in (("time_ratio", WIDTH, TOKENS), ("time_ratio_wide", WIDE, TOKENS // 2)):
        heads = {"plain": Head(VOCAB, width, tokens), "ours": Head(0, width, tokens)}
        for ours, plain in zip(heads["ours"].run(), heads["plain"].run(), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
        times = interleaved({name: head.run for name, head in heads.items()}, rounds=rounds, warm_up=0)
        report.add(
            f"loss_head/{key}",
            times["ours"].median / times["plain"].median,
            times["ours"].minimum / times["plain"].minimum,
            note=f"V {VOCAB}, width {width}, {tokens} tokens",
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = int(sys.argv[1])
    small, large = Head(chosen, 64, 2), Head(chosen, 64, MEMORY_TOKENS)
    sys.stdout.write(f"{memory_added(small.run, large.run)[0]:.1f}\n")
