"""What the stream costs: `python -m tests.bench.data_stream [--quick]`.

Index arithmetic in samples a second, near and after a jump of 10^12 samples; the padding that each packing leaves; and
the loader's share of a training step: the time the trainer waits for a step's rows over that of forward and backward of
the debug model on them, in one process. Its text is the tests' small corpus. `rows()` gives (name, figure) pairs.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from configs.loader import load_run_config
from moe.model import MoEDecoder
from tests.harness import ROOT, write_corpus_source
from trainer.data.config import DataConfig
from trainer.data.corpus import TokenCorpus
from trainer.data.loader import TrainLoader
from trainer.data.online import OnlinePlan
from trainer.data.order import Phase, block_quotas, locate
from trainer.data.prepare import prepare

_LENGTHS = (128, 1024)


def rows(*, samples: int = 1 << 20) -> list[tuple[str, str]]:
    """All figures, as (name, figure)."""
    with tempfile.TemporaryDirectory() as folder:
        source = write_corpus_source(Path(folder) / "source.jsonl")
        config = DataConfig(path=f"{folder}/prepared", source=str(source), vocab_size=512, heldout_fraction=0.1)
        prepare(config)
        return [*_arithmetic(samples), *_padding(config), *_loader(config)]


def _arithmetic(samples: int) -> list[tuple[str, str]]:
    rows_D = [10**6 + 12_345 * domain for domain in range(9)]
    found = []
    for name, count in (("one phase", 1), ("1000 phases", 1000)):
        quotas = [tuple(block_quotas([1 + (domain + n) % 9 for domain in range(9)]).tolist()) for n in range(count)]
        phases = [Phase(n * samples // count, quota, (0,) * 9) for n, quota in enumerate(quotas)]
        found.append(
            (f"samples located a second, {name}", _per_second(samples, lambda p=phases: _locate(0, samples, p, rows_D)))
        )
    far = [Phase(0, tuple(block_quotas([1] * 9).tolist()), (0,) * 9)]
    found.append(
        ("samples located a second, 10^12 further", _per_second(samples, lambda: _locate(10**12, samples, far, rows_D)))
    )
    begin = time.perf_counter()
    _locate(10**12 + 777, 1, far, rows_D)
    found.append(("first sample after a jump of 10^12", f"{1e3 * (time.perf_counter() - begin):.2f} ms"))
    steps = 10_000
    plan = OnlinePlan(
        [str(d) for d in range(9)], rows_D, seed=1, weights_D=[1.0] * 9, max_epochs={}, global_batch_size=256, delay=2
    )
    for step in range(1, steps):
        plan.change([1.0 + (step + d) % 7 for d in range(9)], steps_done=step)
    begin = time.perf_counter()
    plan.locate(np.array([steps * 256]))
    spent = time.perf_counter() - begin
    return [*found, ("resume after 10,000 online changes", f"{spent:.2f} s")]


def _locate(start: int, count: int, phases: list[Phase], rows_D: list[int]) -> None:
    for begin in range(start, start + count, 1 << 16):
        locate(np.arange(begin, min(begin + (1 << 16), start + count)), phases, rows_D=rows_D, seed=3)


def _per_second(samples: int, work: Callable[[], None]) -> str:
    begin = time.process_time()
    work()
    return f"{samples / (time.process_time() - begin) / 1e6:.2f} million"


def _padding(config: DataConfig) -> list[tuple[str, str]]:
    found = []
    for packing in ("split", "best_fit"):
        for length in _LENGTHS:
            corpus = TokenCorpus.open(
                DataConfig(**{**vars(config), "packing": packing}), sequence_length=length, seed=1, mask_documents=True
            )
            places = sum(corpus.rows_D) * length
            pieces = [corpus.pieces(domain) for domain in range(len(corpus.rows_D))]
            filled = sum(int((each.stops_P - each.starts_P).sum()) for each in pieces)
            tokens = sum(int(corpus.document_starts(domain)[-1]) for domain in range(len(corpus.rows_D)))
            found.append((f"padding, {packing}, rows of {length}", f"{1 - filled / places:.2%} ({tokens:,} tokens)"))
    return found


def _loader(config: DataConfig, steps: int = 40) -> list[tuple[str, str]]:
    debug = load_run_config(ROOT / "configs" / "debug.yaml")
    length, batch, micro = debug.train.sequence_length, debug.train.global_batch_size, debug.train.micro_batch_size
    corpus = TokenCorpus.open(config, sequence_length=length, seed=1, mask_documents=False)
    torch.manual_seed(0)
    model = MoEDecoder(debug.model, vocab_size=corpus.vocab_size)
    found = []
    for workers in (0, 1):
        batches = TrainLoader(
            corpus, global_batch_size=batch, micro_batch_size=micro, rank=0, world_size=1, num_workers=workers
        ).batches(0)
        next(batches)
        waited = computed = 0.0
        for _ in range(steps):
            begin = time.perf_counter()
            step = next(batches)
            arrived = time.perf_counter()
            for each in step:
                output = model(each.tokens_bT, each.labels_bT, each.documents_bT)
                (output if isinstance(output, torch.Tensor) else output[0]).sum().backward()
            waited, computed = waited + arrived - begin, computed + time.perf_counter() - arrived
        batches.close()
        found.append(
            (
                f"loader / step of the debug model, {workers or 'no'} worker{'s' if workers != 1 else ''}",
                f"{waited / computed:.2%} ({1e3 * waited / steps:.2f} of {1e3 * computed / steps:.1f} ms)",
            )
        )
    return found


if __name__ == "__main__":
    for name, figure in rows(samples=1 << 16 if "--quick" in sys.argv else 1 << 20):
        print(f"{name:44s} {figure}")
