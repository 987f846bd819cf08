"""The table that `make bench` prints, its targets, and runs/bench.json."""

import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from moe import native

AT_LEAST = {
    "moe_layer/A/limit_over_ours": 0.85,
    "moe_layer/B/limit_over_ours": 0.75,
    "moe_layer/A/best_peer_over_ours": 1.10,
    "moe_layer/B/best_peer_over_ours": 1.10,
    "moe_vs_dense/dense_over_ours": 0.90,
    "train_step/tokens_ratio": 1.15,
    "data/prepare_over_bare_tokenizers": 0.85,
    "data/prepare_over_bare_cpu": 0.85,
}
AT_MOST = {
    "hooks/bias": 1.005,
    "hooks/deferred": 1.02,
    "hooks/frozen": 1.01,
    "hooks/two_pass": 1.35,
    "collectives/extra": 2,
    "host_waits/step": 1,
    "engine/zero_0": 1.05,
    "engine/zero_1": 1.12,
    "engine/zero_2": 1.15,
    "engine/zero_3": 1.50,
    "memory/ours_over_transformers": 0.70,
    "train_step/memory_ratio": 1.0,
    "loss_head/memory_ratio": 0.125,
    "loss_head/time_ratio": 1.1,
    "loss_head/time_ratio_wide": 1.1,
}

VERSIONED = (
    "torch", "triton", "transformers", "deepspeed", "megatron-core", "tokenizers", "torchtitan", "datatrove",
    "liger-kernel", "cut-cross-entropy", "sonic-moe", "quack-kernels",
)  # fmt: skip


class Row(NamedTuple):
    """One figure of the report."""

    median: float
    minimum: float | None
    note: str


class Report:
    """Collects figures, in the order they are to be shown."""

    def __init__(self, at_least: Mapping[str, float] = AT_LEAST, at_most: Mapping[str, float] = AT_MOST) -> None:
        self.rows: dict[str, Row] = {}
        self.missing: dict[str, str] = {}
        """Figures there are none of, and why."""
        self._at_least, self._at_most = at_least, at_most

    def add(self, key: str, median: float, minimum: float | None = None, *, note: str = "") -> None:
        """A ratio of medians, and of minima if it comes from times."""
        self.rows[key] = Row(median, minimum, note)

    def not_run(self, key: str, reason: object) -> None:
        """A figure there is none of, and why."""
        kind = f"{type(reason).__name__}: " if isinstance(reason, Exception) else ""
        self.missing[key] = "not run: " + (kind + str(reason)).splitlines()[0][:100]

    def not_measured(self) -> None:
        """Say so of every figure with a target that nobody has spoken of."""
        for key in [*self._at_least, *self._at_most]:
            if key not in self.rows and key not in self.missing:
                self.missing[key] = "not measured"

    def write(self, path: Path) -> None:
        """The flat object of ratios of medians."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({key: row.median for key, row in self.rows.items()}, indent=1) + "\n")

    def print(self, console: Console) -> None:
        """Every figure beside its target; misses are marked."""
        loop = "compiled" if native.available() else "plain torch"
        found = ", ".join(f"{name} {version}" for name, version in versions().items())
        console.print(hardware())
        self.print_table(
            console,
            title="ratios on this machine; CPU time on one thread, data: wall clock",
            caption=f"{found}\nCPU experts: {loop}",
        )

    def print_table(self, console: Console, *, title: str, caption: str) -> None:
        """The figures alone; what they were measured on is the caller's to say."""
        table = Table(title=title, caption=caption)
        table.add_column("key", no_wrap=True)
        for name in ("median", "minimum", "target"):
            table.add_column(name, justify="right")
        table.add_column("")
        for key, row in self.rows.items():
            target, missed = self._target(key, row.median)
            minimum = "" if row.minimum is None else _shown(row.minimum)
            table.add_row(key, _shown(row.median), minimum, target, f"MISS {row.note}" if missed else row.note)
        for key, reason in self.missing.items():
            table.add_row(key, "", "", self._target(key, 0)[0], reason)
        console.print(table)

    def _target(self, key: str, value: float) -> tuple[str, bool]:
        if key in self._at_least:
            return f">= {self._at_least[key]:g}", value < self._at_least[key]
        if key in self._at_most:
            return f"<= {self._at_most[key]:g}", value > self._at_most[key]
        return "", False


def _shown(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.0f}"


def versions() -> dict[str, str]:
    """Versions of what takes part in a bench, of what is installed."""
    return {name: found for name in VERSIONED if (found := _version(name))}


def hardware() -> str:
    """The processor by its maker's name, its instructions as torch uses them, and how many cores there are."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
