"""Do two runs agree? `python -m launch.compare runs/a runs/b [--rtol 1e-5] [--keys loss,grad_norm]`.

Without --rtol every deterministic metric of every step must be the same to the last bit; times, speed and memory are
left out unless --keys names them. Exit code 0 if they agree, 1 if they do not.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from launch._cli import run_command
from launch._console import terminal
from trainer.errors import ConfigError
from trainer.metrics import Row, read_jsonl

_TIMED = ("time/", "tokens_per_s", "mfu", "memory/")


def main(argv: list[str]) -> int:
    """Compare two runs; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path, help="run folder or metrics.jsonl")
    parser.add_argument("b", type=Path, help="run folder or metrics.jsonl")
    parser.add_argument("--rtol", type=float, default=0.0, help="largest relative difference; 0 asks for equal bits")
    parser.add_argument(
        "--keys", default="", help="metrics to compare, separated by commas; default all deterministic ones"
    )
    arguments = parser.parse_intermixed_args(argv)
    if not (math.isfinite(arguments.rtol) and arguments.rtol >= 0):
        raise ConfigError(f"--rtol: {arguments.rtol} must be finite and not negative")

    a, b = (_rows_by_kind(path) for path in (arguments.a, arguments.b))
    keys = {key.strip() for key in arguments.keys.split(",")} if arguments.keys else set()
    _require(keys, {key for rows in (a, b) for row in rows.values() for key in row})
    differences, largest = differ(a, b, keys=keys, rtol=arguments.rtol)
    console = terminal()
    for line in differences[:5]:
        console.print(line, highlight=False)
    verdict = "agree" if not differences else f"differ in {len(differences)} places"
    how = "bit for bit" if arguments.rtol == 0 else f"within {arguments.rtol:g}"
    console.print(f"{len(a)} rows {verdict} ({how}; largest relative difference {largest:.3g})", highlight=False)
    return 1 if differences else 0


def differ(
    a: dict[tuple[int, str], Row], b: dict[tuple[int, str], Row], *, keys: set[str], rtol: float
) -> tuple[list[str], float]:
    """Every difference as a line, and the largest relative difference of two finite values."""
    differences, largest = [], 0.0
    for place in sorted(a.keys() ^ b.keys()):
        differences.append(f"step {place[0]}: {place[1]} row only in {'the first' if place in a else 'the second'}")
    for place in sorted(a.keys() & b.keys()):
        row_a, row_b = a[place], b[place]
        for key in sorted(keys or row_a.keys() | row_b.keys()):
            if not keys and key.startswith(_TIMED):
                continue
            for where, x, y in _pairs(key, row_a.get(key), row_b.get(key)):
                if isinstance(x, int | float) and isinstance(y, int | float):
                    scale = max(abs(x), abs(y))
                    relative = abs(x - y) / scale if scale else 0.0
                    largest = max(largest, relative)
                    if relative > rtol:
                        differences.append(f"step {place[0]}: {where}: {float(x).hex()} != {float(y).hex()}")
                elif x != y:
                    differences.append(f"step {place[0]}: {where}: {x} != {y}")
    return differences, largest


def _pairs(key: str, x: Any, y: Any) -> Iterator[tuple[str, Any, Any]]:
    """The values to compare under a key: arrays of the same length element by element, all else as it is."""
    if isinstance(x, list) and isinstance(y, list) and len(x) == len(y):
        for i, (one, other) in enumerate(zip(x, y, strict=True)):
            yield from _pairs(f"{key}[{i}]", one, other)
    else:
        yield key, x, y


def _rows_by_kind(path: Path) -> dict[tuple[int, str], Row]:
    rows = read_jsonl(path / "metrics.jsonl" if path.is_dir() else path)
    if not rows:
        raise ConfigError(f"{path}: has no rows yet; there is nothing to compare")
    return {(row["step"], "evaluation" if "eval/loss" in row else "training"): row for row in rows}


def _require(keys: set[str], known: set[str]) -> None:
    """Raises ConfigError for keys that no row has: two runs would agree in what neither of them measured."""
    problems = []
    for key in sorted(keys - known):
        close = get_close_matches(key, sorted(known), n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(sorted(known)[:8])}, ..."
        problems.append(f"--keys: no row of either run has '{key}'; {hint}")
    if problems:
        raise ConfigError(*problems)


if __name__ == "__main__":
    sys.exit(run_command(main))
