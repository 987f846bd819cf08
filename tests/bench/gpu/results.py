"""One run of the GPU bench as a file: what was measured, on what, with what, of which commit.

The schema is the dataclass below; tests/bench/results/README.md tells it in words.
"""

import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from launch._replace_file import replace_file
from tests.bench.report import Report, Row, versions
from tests.harness import ROOT
from trainer.errors import ConfigError

SCHEMA = 1
FOLDER = ROOT / "tests" / "bench" / "results"
FILES = "*-????-??-??-??????.json"  # of this bench, among others in the folder
ALLOCATOR = "expandable_segments:True"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One file."""

    schema: int
    date: str
    """When the run ended, ISO 8601 in UTC."""
    commit: str
    """Of this repository, 40 hex digits; with "-dirty" where files differed from it; "unknown" outside git."""
    hardware: dict[str, Any]
    """gpu, memory_gib, multiprocessors, capability, driver, cuda, cpu_count."""
    versions: dict[str, str]
    settings: dict[str, str]
    """The allocator's, and the seconds the run took."""
    figures: dict[str, dict[str, Any]]
    """By key: median, minimum (null where it is no ratio of times) and note."""
    missing: dict[str, str]
    """Figures there are none of, by key, and why."""

    def report(self, at_least: dict[str, float], at_most: dict[str, float]) -> Report:
        """The figures as a table to print."""
        report = Report(at_least, at_most)
        report.rows = {key: Row(**row) for key, row in self.figures.items()}
        report.missing = dict(self.missing)
        return report


def result_of(report: Report, *, seconds: float) -> Result:
    """What this machine and checkout add to a report. There must be a CUDA device."""
    properties = torch.cuda.get_device_properties(0)
    return Result(
        schema=SCHEMA,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=_commit(),
        hardware={
            "gpu": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": _driver(),
            "cuda": torch.version.cuda or "unknown",
            "cpu_count": os.cpu_count(),
        },
        versions=versions(),
        settings={"allocator": ALLOCATOR, "backend": torch.cuda.get_allocator_backend(), "seconds": f"{seconds:.0f}"},
        figures={key: row._asdict() for key, row in report.rows.items()},
        missing=dict(report.missing),
    )


def save(result: Result, folder: Path = FOLDER) -> Path:
    """Write the file of this run; its name is made of GPU and date."""
    name = re.sub(r"[^a-z0-9]+", "-", str(result.hardware["gpu"]).lower()).strip("-")
    when = result.date[:19].replace(":", "").replace("T", "-")
    path = folder / f"{name}-{when}.json"
    replace_file(path, json.dumps(asdict(result), indent=1, allow_nan=False) + "\n")
    return path


def load(path: Path) -> Result:
    """Read and check a file; ConfigError says what is wrong with it."""
    try:
        tree = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); remove it or restore it from git") from error
    problem = _problem(tree)
    if problem:
        raise ConfigError(f"{path}: {problem}; it was not written by tests.bench.gpu, or by another version of it")
    return Result(**tree)


def newest(folder: Path = FOLDER) -> Path | None:
    """The file of the latest run, or None if nothing was measured yet."""
    return max(folder.glob(FILES), key=lambda path: load(path).date, default=None)


def _problem(tree: Any) -> str:
    """The first thing that is not as `Result` says; empty if all is."""
    names = {field.name for field in fields(Result)}
    if not isinstance(tree, dict) or set(tree) != names:
        return f"the keys must be {', '.join(sorted(names))}"
    if tree["schema"] != SCHEMA:
        return f"schema {tree['schema']!r} is not {SCHEMA}"
    for name in ("hardware", "versions", "settings", "figures", "missing"):
        if not isinstance(tree[name], dict):
            return f"{name} must be an object"
    try:
        datetime.fromisoformat(tree["date"])
    except (TypeError, ValueError):
        return f"date {tree['date']!r} is not ISO 8601"
    if not re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", str(tree["commit"])):
        return f"commit {tree['commit']!r} is neither 40 hex digits nor unknown"
    if not isinstance(tree["hardware"].get("gpu"), str) or not tree["hardware"]["gpu"]:
        return "hardware.gpu is missing"
    for key, row in tree["figures"].items():
        if not key.startswith("gpu/"):
            return f"figure {key!r} does not begin with gpu/"
        if not isinstance(row, dict) or set(row) != set(Row._fields):
            return f"figure {key} must have {', '.join(Row._fields)}"
        if not _is_number(row["median"]) or not (row["minimum"] is None or _is_number(row["minimum"])):
            return f"figure {key} is not a finite number"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _commit() -> str:
    """Of the checkout; a copy without git may be told by EVENKEEL_COMMIT."""
    if told := os.environ.get("EVENKEEL_COMMIT"):
        return told
    try:
        head, changed = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    return done.stdout.split("\n")[0].strip() or "unknown"
