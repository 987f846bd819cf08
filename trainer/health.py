"""Before training: can these ranks train together? A second here saves a night on a large cluster.

Refused, with the rank and the host that differ: other versions, code or configuration (exit 2), links that lose or
alter data, a rank that is silent (5), a run folder that is not shared or cannot hold one checkpoint (6). Warned of, or
refused too with `strict`: a slow rank, unlike accelerators, clocks apart, little bandwidth, little disk. Every rank
sees the same facts and comes to the same verdict, so no rank is left waiting for one that gave up.
"""

import hashlib
import json
import math
import os
import secrets
import shutil
import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer import health_probes as probes
from trainer import health_verdicts as verdicts
from trainer import ranks

_VISIBLE_WITHIN_S = 10.0  # caches of network file systems may hide a new file for some seconds


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """What is checked before the first step."""

    enabled: bool = True
    """Look at ranks, links and storage before training."""
    strict: bool = False
    """End with exit code 5 (6 for disk space) for what is otherwise only a warning."""
    slow_factor: float = 2.0
    """A rank is slow whose matrix product takes this many times as long as the median rank's."""
    max_clock_skew_s: float = 5.0
    """Seconds that two nodes' clocks may lie apart."""
    min_bandwidth_gb_s: float = 0.0
    """Least bus bandwidth of an all-reduce and an all-to-all over all ranks; 0 only reports it."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        if not (math.isfinite(self.slow_factor) and self.slow_factor > 1):
            found.append(f"slow_factor: {self.slow_factor} must be above 1, the median itself")
        if not (math.isfinite(self.max_clock_skew_s) and self.max_clock_skew_s > 0):
            found.append(f"max_clock_skew_s: {self.max_clock_skew_s} must be a positive number of seconds")
        if not (math.isfinite(self.min_bandwidth_gb_s) and self.min_bandwidth_gb_s >= 0):
            found.append(f"min_bandwidth_gb_s: {self.min_bandwidth_gb_s} must not be negative; 0 only reports")
        return found


@dataclass(frozen=True)
class Health:
    """What was found: numbers for the record, and warnings for a person."""

    record: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    def line(self) -> str:
        """The result in one line."""
        record = self.record
        parts = [
            f"{_count(record['ranks'], 'rank')} on {_count(len(record['hosts']), 'host')} ({record['accelerator']})"
        ]
        if "all_reduce_gb_s" in record:
            parts.append(f"all-reduce {record['all_reduce_gb_s']:.2f} GB/s")
            parts.append(f"all-to-all {record['all_to_all_gb_s']:.2f} GB/s")
            parts.append(f"slowest rank {record['slowest_rank']} at {record['slowest_ratio']:.2f} x the median")
            parts.append(f"clocks within {record['clock_skew_s'] * 1e3:.0f} ms")
        parts.append(f"{record['free_gib']:.1f} GiB free for checkpoints of {record['checkpoint_gib']:.2g} GiB")
        parts.append(f"checked in {record['seconds']:.1f} s")
        return "health: " + ", ".join(parts)


def check_health(
    config: HealthConfig,
    *,
    run_dir: Path,
    settings: Mapping[str, Any],
    checkpoint_bytes: float,
    keep: int,
) -> Health:
    """Look at every rank; every rank calls it, with the process group started. `run_dir` exists.

    `settings`: the configuration by full key. `checkpoint_bytes`: of one checkpoint, about; `keep`: how many the folder
    is to hold. Raises ConfigError, PeerLostError or StorageError, on every rank.
    """
    began = time.monotonic()
    device = ranks.device()
    if ranks.is_main():
        for left in run_dir.glob(".health-*"):  # by a start that was killed during this check
            left.unlink(missing_ok=True)
    # One rank counts: another's view of a network file system may be older, and all must come to the same verdict.
    token, saved = ranks.broadcast_object((secrets.token_hex(8), len(list(run_dir.glob("checkpoints/step-*")))))
    own_mark = run_dir / f".health-{token}-{ranks.rank()}"
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    try:
        told = ranks.gather_objects(
            {
                "host": socket.gethostname(),
                "facts": probes.facts(device),
                "settings": digest,
                "accelerator": probes.accelerator(device),
                "storage": _leave_mark(own_mark) if ranks.local_rank() == 0 else "",
            }
        )
        hosts = [each["host"] for each in told]
        verdicts.refuse_unlike(hosts, [each["facts"] for each in told])
        if len({each["settings"] for each in told}) > 1:
            verdicts.refuse_settings(hosts, ranks.gather_objects(dict(settings)))
        marked = [rank for rank, each in enumerate(told) if each["storage"] == "written"]
        probes.links_hold(device)
        measured = ranks.gather_objects(
            {
                "storage": told[ranks.rank()]["storage"],
                "unseen": _unseen(run_dir, token, marked) if ranks.local_rank() == 0 else [],
                "free": _free_bytes(run_dir),
                "clock": probes.clock(),  # a barrier: from here on all ranks work at the same time, as in a step
                "matmul_s": probes.matmul_seconds(device),
                **probes.bandwidths(device),
            }
        )
    finally:
        with suppress(OSError):  # it may never have been written, and the verdict says why
            own_mark.unlink()
    verdicts.refuse_storage(run_dir, hosts, measured, checkpoint_bytes)
    record = _record(hosts, told[0]["accelerator"], measured, checkpoint_bytes)
    warnings = [
        *verdicts.unlike_accelerators(hosts, [each["accelerator"] for each in told]),
        *verdicts.slow_ranks(hosts, [each["matmul_s"] for each in measured], config.slow_factor),
        *verdicts.clocks_apart(hosts, [each["clock"] for each in measured], config.max_clock_skew_s),
        *verdicts.little_bandwidth(record, config.min_bandwidth_gb_s),
    ]
    # The oldest goes when the newest is there.
    tight = verdicts.little_disk(run_dir, record, checkpoint_bytes, max(keep + 1 - saved, 1))
    if config.strict:
        verdicts.refuse_warnings(warnings, tight)
    return Health(record | {"seconds": time.monotonic() - began}, warnings + tight)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _leave_mark(path: Path) -> str:
    """`written`, or why this node cannot write to the run folder."""
    try:
        path.write_text(socket.gethostname())
    except OSError as error:
        return error.strerror or type(error).__name__
    return "written"


def _unseen(run_dir: Path, token: str, marked: Sequence[int]) -> list[int]:
    """Ranks whose mark this node does not find, after giving a network file system some time to show it."""
    deadline = time.monotonic() + _VISIBLE_WITHIN_S
    while True:
        here = set(os.listdir(run_dir)) if run_dir.is_dir() else set()
        missing = [rank for rank in marked if f".health-{token}-{rank}" not in here]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.05)


def _free_bytes(folder: Path) -> int:
    with suppress(OSError):
        return shutil.disk_usage(folder).free
    return 0


def _record(
    hosts: Sequence[str], accelerator: str, measured: Sequence[Mapping[str, Any]], checkpoint_bytes: float
) -> dict[str, Any]:
    seconds = [each["matmul_s"] for each in measured]
    clocks = [each["clock"] for each in measured]
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    return {
        "ranks": len(hosts),
        "hosts": sorted(set(hosts)),
        "accelerator": accelerator,
        "matmul_s": seconds,
        "slowest_rank": slowest,
        "slowest_ratio": seconds[slowest] / statistics.median_low(seconds),
        "clock_skew_s": max(clocks) - min(clocks),
        "free_gib": min(each["free"] for each in measured) / 2**30,
        "checkpoint_gib": checkpoint_bytes / 2**30,
    } | {key: min(each[key] for each in measured) for key in measured[0] if key.endswith("_gb_s")}
