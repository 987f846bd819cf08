"""Health checks of two ranks, one of which is not like the other: argv[1] is a folder for the results.

Every case is a real difference where this machine can make one. Clocks cannot be set apart, so one is a wrapper.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer import health_probes, ranks
from trainer.errors import EvenkeelError
from trainer.health import HealthConfig, check_health
from trainer.process_group import leave, start_process_group, stop_process_group

FOLDER = Path(sys.argv[1])


CALM = HealthConfig(slow_factor=1e3)
"""Other jobs on this machine make a rank slow too, which is no concern of most cases."""


def case(config: HealthConfig = CALM, **differing: Any) -> dict[str, Any]:
    """One check; what came of it on this rank."""
    arguments = {
        "run_dir": FOLDER / "run", "settings": {"train.steps": 12, "seed": 1}, "checkpoint_bytes": 1e6,
        "keep": 2,
    } | differing  # fmt: skip
    try:
        health = check_health(config, **arguments)
    except EvenkeelError as error:
        return {"error": str(error), "code": error.exit_code, "everywhere": error.is_everywhere}
    return {"warnings": health.warnings, "record": health.record, "line": health.line()}


@contextmanager
def other_code() -> Iterator[None]:
    """Rank 1 looks at a tree of the same files with one comment more."""
    original = health_probes.__file__
    if ranks.rank() == 1:
        root = Path(original).parents[1]
        for package in ("trainer", "moe", "reweighting", "configs", "launch"):
            shutil.copytree(root / package, FOLDER / "tree" / package, ignore=shutil.ignore_patterns("__pycache__"))
        with (FOLDER / "tree" / "moe" / "router.py").open("a") as file:
            file.write("# changed\n")
        health_probes.__file__ = str(FOLDER / "tree" / "trainer" / "health_probes.py")
    yield
    health_probes.__file__ = original


@contextmanager
def clock_ahead() -> Iterator[None]:
    original = time.time
    if ranks.rank() == 1:
        time.time = lambda: original() + 60
    yield
    time.time = original


@contextmanager
def busy_core() -> Iterator[None]:
    """Rank 1 shares one core with a process that is served first. Last: a rank cannot take its niceness back."""
    spinner = None
    if ranks.rank() == 1:
        core = {min(os.sched_getaffinity(0))}
        os.sched_setaffinity(0, core)
        spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        os.nice(10)  # about a tenth of the core is left
    yield
    if spinner is not None:
        spinner.kill()
        spinner.wait()


def main() -> None:
    start_process_group(60)
    os.environ["LOCAL_RANK"] = "0"  # each rank looks at storage as the first one of its own node does
    rank = ranks.rank()
    for name in ("run", "own-0", "own-1"):
        (FOLDER / name).mkdir(exist_ok=True)
    (FOLDER / "file").touch()
    mine = {0: FOLDER / "own-0", 1: FOLDER / "own-1"}[rank]
    found = {"fit": case()}
    with other_code():
        found["code"] = case()
    found["settings"] = case(settings={"train.steps": 12 + rank, "seed": 1} | ({"new.key": True} if rank else {}))
    found["not shared"] = case(run_dir=mine)
    found["not writable"] = case(run_dir=FOLDER / ("file" if rank else "run"))
    found["no room"] = case(checkpoint_bytes=1e15)
    free = shutil.disk_usage(FOLDER).free
    found["little room"] = case(checkpoint_bytes=free / 2)
    found["bandwidth"] = case(HealthConfig(slow_factor=1e3, min_bandwidth_gb_s=1e6))
    with clock_ahead():
        found["clock"] = case()
    with busy_core():
        found["slow"] = case(HealthConfig(slow_factor=3.0))
        found["strict"] = case(HealthConfig(slow_factor=3.0, strict=True))
    found["left"] = sorted(path.name for path in FOLDER.glob("*/.health-*"))
    (FOLDER / f"rank-{rank}.json").write_text(json.dumps(found))
    stop_process_group()


if __name__ == "__main__":
    main()
    leave(0)
