"""`make bench`: ratios of this machine, all from one run. Prints a table with targets and writes runs/bench.json.

One file a family of workloads: layer.py (and peers.py), train_step.py, engine.py, loss_head.py, hooks.py,
collectives.py, host_waits.py, memory.py, recompute.py. How things are timed is in timing.py, targets are in report.py,
what was learned on the way in NOTES.md. Commands of their own, for they take minutes: tests.bench.compiled, .data,
.reweighting, .growth (drawn by .figures) and the studies. On a GPU: tests.bench.gpu.
"""

import logging
import os
import sys
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console

from tests.bench import collectives, engine, hooks, host_waits, layer, loss_head, memory, recompute, train_step
from tests.bench.report import Report
from tests.bench.timing import keep_freed_memory

FAMILIES = {
    "memory": memory.measure,
    "recompute": recompute.measure,
    "hooks": hooks.measure,
    "collectives": collectives.measure,
    "host_waits": host_waits.measure,
    "train_step": train_step.measure,
    "engine": engine.measure,
    "loss_head": loss_head.measure,
    "layer": layer.measure,
}

if __name__ == "__main__":
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "ERROR")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    chosen = sys.argv[1:] or list(FAMILIES)
    report, begin = Report(), time.monotonic()
    keep_freed_memory()
    for name in chosen:
        FAMILIES[name](report)
        sys.stderr.write(f"{name} done, {time.monotonic() - begin:.0f} s\n")
    report.print(Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120))
    report.write(Path("runs/bench.json"))
