"""What the facts and numbers of trainer/health_probes.py mean: who is refused, who is warned of. Pure functions.

Lists are by rank. Every rank judges the same lists, so every rank raises the same error or none does.
"""

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError, EvenkeelError, PeerLostError, StorageError

_SPARE_FACTOR = 1.2  # a checkpoint's size is an estimate


def refuse_unlike(hosts: Sequence[str], facts: Sequence[Mapping[str, str]]) -> None:
    """Raises ConfigError that names the first rank of each fact that is not the same everywhere."""
    problems = []
    for what in facts[0]:
        values = [each.get(what, "none") for each in facts]
        odd = odd_one_out(values)
        if odd is not None:
            problems.append(f"health: {what} is {_differs(odd, values, hosts)}; install the same everywhere")
    if problems:
        raise ConfigError(*problems)


def refuse_settings(hosts: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> None:
    """Raises ConfigError with every key of the configuration that is not the same everywhere."""
    problems = []
    for key in sorted({key for each in settings for key in each}):
        values = [json.dumps(each.get(key)) for each in settings]
        odd = odd_one_out(values)
        if odd is not None:
            problems.append(
                f"health: {key} is {_differs(odd, values, hosts)}; start every node with the same configuration"
            )
    raise ConfigError(*problems)


def refuse_storage(
    run_dir: Path, hosts: Sequence[str], measured: Sequence[Mapping[str, Any]], checkpoint_bytes: float
) -> None:
    """Raises StorageError if a node cannot use the run folder, or the folder cannot hold one checkpoint."""
    for rank, each in enumerate(measured):
        if each["storage"] not in ("written", ""):
            raise _alike(
                StorageError(f"health: {_name(rank, hosts)} cannot write to {run_dir.absolute()} ({each['storage']})")
            )
        if each["unseen"]:
            raise _alike(
                StorageError(
                    f"health: {_name(rank, hosts)} does not see in {run_dir.absolute()} what "
                    f"{_name(each['unseen'][0], hosts)} wrote there; put run_dir on storage that all nodes share"
                )
            )
    free = min(each["free"] for each in measured)
    if free < _SPARE_FACTOR * checkpoint_bytes:
        raise _alike(
            StorageError(
                f"health: {run_dir.absolute()} has {free / 2**30:.2f} GiB free, a checkpoint of this run takes about "
                f"{checkpoint_bytes / 2**30:.2f}; free space or set another run_dir"
            )
        )


def unlike_accelerators(hosts: Sequence[str], names: Sequence[str]) -> list[str]:
    """A warning for the first rank with another accelerator than most."""
    odd = odd_one_out(names)
    if odd is None:
        return []
    return [f"health: the accelerator is {_differs(odd, names, hosts)}; every step waits for the slower one"]


def slow_ranks(hosts: Sequence[str], seconds: Sequence[float], factor: float) -> list[str]:
    """A warning for each rank that takes more than `factor` times the median; of two ranks the faster is the median."""
    typical = statistics.median_low(seconds)
    return [
        f"health: {_name(rank, hosts)} is slow: a matrix product takes {each * 1e3:.1f} ms, {each / typical:.1f} times "
        "the median; look for another job, throttling or a failing device there"
        for rank, each in enumerate(seconds)
        if each > factor * typical
    ]


def clocks_apart(hosts: Sequence[str], clocks: Sequence[float], limit_s: float) -> list[str]:
    """A warning for the clock that is farthest from the median, if that is too far."""
    typical = statistics.median_low(clocks)
    worst = max(range(len(clocks)), key=lambda rank: abs(clocks[rank] - typical))
    skew = clocks[worst] - typical
    if abs(skew) <= limit_s:
        return []
    return [f"health: the clock of {_name(worst, hosts)} is {skew:+.1f} s off the median; synchronise it (NTP)"]


def little_bandwidth(record: Mapping[str, Any], least_gb_s: float) -> list[str]:
    """A warning for each collective below the limit."""
    return [
        f"health: {what} runs at {record[key]:.2f} GB/s over all ranks, less than health.min_bandwidth_gb_s "
        f"{least_gb_s:g}; look at NCCL_DEBUG=INFO for the interface it chose"
        for what, key in (("all-reduce", "all_reduce_gb_s"), ("all-to-all", "all_to_all_gb_s"))
        if key in record and record[key] < least_gb_s
    ]


def little_disk(run_dir: Path, record: Mapping[str, Any], checkpoint_bytes: float, count: int) -> list[str]:
    """A warning if the run folder cannot hold `count` more checkpoints."""
    if record["free_gib"] * 2**30 >= count * checkpoint_bytes:
        return []
    return [
        f"health: {run_dir} has {record['free_gib']:.2f} GiB free, {count} more checkpoints of about "
        f"{record['checkpoint_gib']:.2f} GiB will not fit; free space or lower checkpoint.keep"
    ]


def odd_one_out(values: Sequence[str]) -> tuple[int, int] | None:
    """(first rank whose value is not the most frequent one, first rank whose value is); None if all are alike.

    Where two values are equally frequent, that of the lowest rank counts as the usual one.
    """
    usual = Counter(values).most_common(1)[0][0]
    odd = next((rank for rank, value in enumerate(values) if value != usual), None)
    return None if odd is None else (odd, values.index(usual))


def _differs(pair: tuple[int, int], values: Sequence[str], hosts: Sequence[str]) -> str:
    odd, usual = pair
    return f"{values[odd]} on {_name(odd, hosts)} but {values[usual]} on {_name(usual, hosts)}"


def _name(rank: int, hosts: Sequence[str]) -> str:
    return f"rank {rank} ({hosts[rank]})"


def refuse_warnings(warnings: Sequence[str], tight: Sequence[str]) -> None:
    """Raises PeerLostError for the first warning of ranks or links, or StorageError for one of disk space."""
    if warnings:
        raise _alike(PeerLostError(f"{warnings[0]} (health.strict)"))
    if tight:
        raise _alike(StorageError(f"{tight[0]} (health.strict)"))


def _alike(error: EvenkeelError) -> EvenkeelError:
    """Marks an error that every rank raises, so that one of each node says it."""
    error.is_everywhere = True
    return error
