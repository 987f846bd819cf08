"""What compiled regions do for an optimizer step: `python -m tests.bench.compiled`, a minute; `make bench` skips it.

The step of train_step.py (loop, engine, bias hook) on the same model, weights and batches, with `model.compile` and
without, in turn. Losses of the first steps are compared before anything is timed.
"""

import logging
import os
import time
import warnings
from dataclasses import replace

import torch
from rich.console import Console

from moe.model import MoEDecoder
from tests.bench.group import join_process_group
from tests.bench.report import Report
from tests.bench.timing import interleaved, keep_freed_memory
from tests.bench.train_step import SHAPE, STEP, VOCAB, start_ours


def measure(report: Report, rounds: int = 10) -> None:
    """Ratio of a step's CPU time, compiled over eager."""
    join_process_group()
    steps, losses, began = {}, {}, {}
    for name in ("eager", "compiled"):
        torch.manual_seed(0)
        model = MoEDecoder(replace(SHAPE, compile=name == "compiled"), vocab_size=VOCAB)
        steps[name] = start_ours(model, STEP)
        begin = time.monotonic()
        losses[name] = torch.tensor([steps[name]() for _ in range(3)])
        began[name] = time.monotonic() - begin
    torch.testing.assert_close(losses["compiled"], losses["eager"], rtol=1e-6, atol=0)
    times = interleaved(dict(steps), rounds=rounds)
    of, to = times["compiled"], times["eager"]
    note = f"first three steps {began['compiled']:.0f} s instead of {began['eager']:.0f}"
    report.add("train_step/compiled_over_eager", of.median / to.median, of.minimum / to.minimum, note=note)


if __name__ == "__main__":
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "ERROR")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    keep_freed_memory()
    found = Report()
    measure(found)
    found.print(Console(width=120))
