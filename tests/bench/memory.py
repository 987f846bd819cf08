"""`memory`: how much one layer's forward and backward raises the peak of resident memory, each in its own process.

`python -m tests.bench.memory NAME` prints MiB of `ours` or of a peer, on workload B.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from moe.config import ModelConfig
from tests.bench.report import Report

REFERENCE = "transformers_qwen3_grouped_mm"


def measure(report: Report) -> None:
    """Ours over transformers' grouped products: what a pass adds, and the whole process. The allocator as it comes."""
    found = printed_by("tests.bench.memory", ["ours", REFERENCE])
    for name, printed in found.items():
        if isinstance(printed, str):
            report.not_run("memory/ours_over_transformers", f"{name}: {printed}")
            return
    for key, ours, theirs in zip(("ours_over_transformers", "whole_process"), *found.values(), strict=True):
        report.add(f"memory/{key}", ours / theirs, note=f"{ours:.0f} MiB, transformers {theirs:.0f} MiB")


def printed_by(module: str, names: Sequence[str], *arguments: str) -> dict[str, list[float] | str]:
    """Last two numbers printed by `python -m MODULE NAME ...` for each name, or why there are none; all run at once,
    which memory does not mind."""
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", module, name, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for name in names
    }
    found = dict[str, list[float] | str]()
    for name, process in processes.items():
        said, complaints = process.communicate()
        found[name] = complaints.strip().splitlines()[-1] if process.returncode else [*map(float, said.split()[-2:])]
    return found


def _resident_mib(peak: bool) -> float:
    field = "VmHWM:" if peak else "VmRSS:"
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))


def memory_added(small: Callable[[], object], large: Callable[[], object]) -> tuple[float, float]:
    """MiB that `large` adds to the memory in use, and the peak with all of it. `small`: a little of everything first,
    so that libraries and their buffers are there."""
    small()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _resident_mib(peak=False)
    large()
    return _resident_mib(peak=True) - before, _resident_mib(peak=True)


def _pass_mib(name: str) -> tuple[float, float]:
    """What a forward and backward adds to the memory in use, weights and input apart, and the peak with all of it."""
    from tests.bench.layer import WORKLOADS, Workload
    from tests.bench.peers import PEERS

    def prepare(config: ModelConfig, tokens: int) -> Callable[[], object]:
        workload = Workload(config, tokens)
        module = workload.layer if name == "ours" else PEERS[name](workload.config, workload.weights).module
        del workload.layer, workload.sigmoid
        return lambda: workload.run(module)

    small = prepare(replace(WORKLOADS["B"], num_experts=8, expert_intermediate_size=16), 64)
    return memory_added(small, prepare(WORKLOADS["B"], 4096))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write("{:.1f} {:.1f}\n".format(*_pass_mib(sys.argv[1])))
