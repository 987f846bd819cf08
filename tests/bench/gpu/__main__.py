"""`make gpu-bench`: this project on one CUDA GPU against its bounds, its peers and its targets, in under eight minutes.

`python -m tests.bench.gpu [FAMILY ...]` measures, prints the table and writes one file under tests/bench/results.
`python -m tests.bench.gpu --show` prints the newest of these files, or the targets as not measured; it needs no GPU.
Exit code 2: there is no GPU, or no such family. 1: a family failed.

Each family runs in a process of its own, one after the other: what one leaves on the GPU, or fails with, does not
reach the next. Whatever is compared with each other is timed in one process, in turn. One file a family or two:
layer.py, loss_head.py, step.py; targets.py, results.py.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from launch._cli import run_command
from launch._replace_file import replace_file
from tests.bench.gpu import layer, loss_head, results, step
from tests.bench.gpu.targets import AT_LEAST, AT_MOST
from tests.bench.report import Report, Row
from tests.harness import ROOT
from trainer.errors import ConfigError


class Family(NamedTuple):
    """Workloads that are measured in one process."""

    measure: Callable[[Report, torch.device], None]
    seconds: float
    """It may take, and what those before it have left."""


FAMILIES = {
    "train_step": Family(step.measure, 110),
    "train_step_peer": Family(step.measure_peer, 90),
    "skew": Family(layer.measure_skew, 30),
    "loss_head": Family(loss_head.measure, 40),
    "moe_layer": Family(layer.measure, 200),  # last: how long peers compile nobody knows
}
LOG = Path("runs/gpu-bench.log")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"some of: {', '.join(FAMILIES)}; default all")
    parser.add_argument("--show", action="store_true", help="print the newest result instead of measuring")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # this is the process of one family
    arguments = parser.parse_args(argv)
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140)
    if arguments.show:
        return show(console)
    unknown = [name for name in arguments.families if name not in FAMILIES]
    if unknown:
        raise ConfigError(f"no family '{unknown[0]}'; there are {', '.join(FAMILIES)}")
    if not torch.cuda.is_available():
        raise ConfigError(
            "torch sees no CUDA GPU, and nothing is measured without one; --show prints targets and what was measured"
        )
    if arguments.into:
        return measure_family(arguments.families[0], arguments.into, torch.device("cuda", 0))
    return measure(arguments.families or list(FAMILIES), console)


def show(console: Console, folder: Path = results.FOLDER) -> int:
    """Print the newest result, or every target as not measured."""
    path = results.newest(folder)
    if path is None:
        report = Report(AT_LEAST, AT_MOST)
        report.not_measured()
        report.print_table(console, title="targets on one GPU", caption="no run on a GPU is recorded yet")
        return 0
    print_result(console, results.load(path), path)
    return 0


def print_result(console: Console, result: results.Result, path: Path) -> None:
    """The table of a run, with what it ran on."""
    report = result.report(AT_LEAST, AT_MOST)
    report.not_measured()
    told = ", ".join(f"{name} {value}" for name, value in (result.hardware | result.settings).items())
    used = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    caption = f"{told}\n{used}\ncommit {result.commit}; {path.name}"
    report.print_table(console, title=f"{result.hardware['gpu']}, {result.date}; times by CUDA events", caption=caption)


def measure(families: list[str], console: Console, folder: Path = results.FOLDER) -> int:
    """Run the families one by one, print what they found and write it down; 1 if one of them failed."""
    report, begin, deadline, failed = Report(AT_LEAST, AT_MOST), time.monotonic(), 0.0, False
    LOG.parent.mkdir(parents=True, exist_ok=True)
    LOG.write_text("")
    for name in families:
        deadline += FAMILIES[name].seconds
        reason = run_family(name, report, timeout_s=deadline - (time.monotonic() - begin))
        if reason:
            failed = True
            report.not_run(f"gpu/{name}", reason)
        sys.stderr.write(f"{name} {'failed' if reason else 'done'}, {time.monotonic() - begin:.0f} s\n")
    result = results.result_of(report, seconds=time.monotonic() - begin)
    path = results.save(result, folder)
    print_result(console, result, path)
    sys.stderr.write(f"written to {path}; what the families said is in {LOG}\n")
    return int(failed)


def run_family(name: str, report: Report, *, timeout_s: float) -> str:
    """Add to the report what a process of its own measures; returns why the family is not complete, or ''."""
    into = LOG.with_name(f"gpu-bench-{name}.json")
    into.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.bench.gpu", name, "--into", str(into)]
    # expandable_segments lets everybody's large tensors come and go without holes; the older name is an alias.
    environment = os.environ | dict.fromkeys(("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), results.ALLOCATOR)
    environment |= {"DEEPSPEED_LOG_LEVEL": "ERROR"}
    reason = ""
    with LOG.open("a") as log:
        try:
            done = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            reason = f"the time was up after {timeout_s:.0f} s"
        else:
            if done.returncode:
                lines = LOG.read_text().strip().splitlines()
                reason = f"exit code {done.returncode}: {lines[-1] if lines else 'it said nothing'}"
    if into.exists():
        found = json.loads(into.read_text())
        report.rows |= {key: Row(*row) for key, row in found["rows"].items()}
        report.missing |= found["missing"]
    return reason


class _KeptReport(Report):
    """Writes down every figure at once: what was measured before a failure is not lost with it."""

    def __init__(self, path: Path) -> None:
        super().__init__(AT_LEAST, AT_MOST)
        self._path = path

    def add(self, key: str, median: float, minimum: float | None = None, *, note: str = "") -> None:
        super().add(key, median, minimum, note=note)
        self._keep()

    def not_run(self, key: str, reason: object) -> None:
        super().not_run(key, reason)
        self._keep()

    def _keep(self) -> None:
        replace_file(self._path, json.dumps({"rows": self.rows, "missing": self.missing}))


def measure_family(name: str, into: Path, device: torch.device) -> int:
    """The process of one family."""
    FAMILIES[name].measure(_KeptReport(into), device)
    return 0


if __name__ == "__main__":
    os.chdir(ROOT)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sys.exit(run_command(main))
