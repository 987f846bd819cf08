"""Run the real commands in real processes and look at what they leave behind."""

import atexit
import inspect
import json
import os
import pydoc_data.topics
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from trainer.data.config import DataConfig

ROOT = Path(__file__).parents[1]


def write_corpus_source(path: Path) -> Path:
    """A jsonl of about 300 kB in three domains: code, prose and a table of numbers."""
    code_modules = [
        "argparse",
        "ast",
        "dataclasses",
        "enum",
        "inspect",
        "json.decoder",
        "pathlib",
        "textwrap",
        "typing",
    ]
    rows = []
    for name in code_modules:
        source = inspect.getsource(__import__(name, fromlist=["_"]))
        rows += [{"text": part, "domain": "code"} for part in _pieces(source, 3000)]
    topics = pydoc_data.topics.topics
    rows += [{"text": part, "domain": "prose"} for name in sorted(topics)[:40] for part in _pieces(topics[name], 2000)]
    for start in range(0, 4000, 50):
        table = "\n".join(f"{n} {n * n} {n % 7} {n % 11}" for n in range(start, start + 50))
        rows.append({"text": table, "domain": "table"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _pieces(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def tiny_config(folder: Path, data: DataConfig, /, **sections: object) -> Path:
    """A config file of a model that trains twelve steps in a second or two."""
    tree: dict[str, object] = {
        "name": "tiny",
        "run_dir": str(folder / "run"),
        "seed": 3,
        "model": {
            "hidden_size": 32, "num_layers": 3, "num_dense_layers": 1, "dense_intermediate_size": 48, "num_heads": 4,
            "num_kv_heads": 2, "num_experts": 8, "top_k": 2, "expert_intermediate_size": 16, "num_shared_experts": 1,
        },
        "data": {
            "path": data.path, "source": data.source, "vocab_size": data.vocab_size,
            "heldout_fraction": data.heldout_fraction,
        },
        "train": {"steps": 12, "global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 32},
        "optimizer": {"learning_rate": 3e-3, "clip_norm": 0.5},
        "schedule": {"warmup_steps": 3},
        "engine": {"precision": "fp32", "zero_stage": 0, "collective_timeout_s": 60.0},
        "evaluation": {"every": 6, "max_rows": 3},
        "checkpoint": {"every": 4, "keep": 2},
        "wandb": {"mode": "disabled"},
        "hooks": {
            "expert_bias": {"rule": "sign", "rate": 0.01},
            "sample_reweight": {"strategy": "linupper", "temperature": {"value": 0.5, "warmup_steps": 2}},
        },
    }  # fmt: skip
    for name, values in sections.items():
        current = tree.get(name)
        tree[name] = {**current, **values} if isinstance(current, dict) and isinstance(values, dict) else values
    path = folder / "config.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child process: the repository on the path, no GPU-less surprises, no old torchrun."""
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    }
    return env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | extra


def command(module: str, *arguments: str, ranks: int = 0) -> list[str]:
    """The command line of one of ours, under our torchrun if `ranks`."""
    if not ranks:
        return [sys.executable, "-m", module, *arguments]
    launcher = [sys.executable, "-m", "launch.torchrun", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, "-m", module, *arguments]


def run(
    module: str, *arguments: str, ranks: int = 0, timeout: float = 240, cwd: Path = ROOT, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command(module, *arguments, ranks=ranks),
        cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


class TrainingJob:
    """A job of some ranks that trains what it is given, one configuration after the other, until it is closed.

    Starting ranks costs seconds for each of them (tests/dist/worker.py has the other side).
    """

    def __init__(self, ranks: int, seam: str = "") -> None:
        self._orders = Path(tempfile.mkdtemp(prefix="evenkeel-job-"))
        self._number = 0
        arguments = [str(self._orders), *([seam] if seam else [])]
        with (self._orders / "stderr").open("w") as stderr:
            self._process = subprocess.Popen(
                command("tests.dist.worker", *arguments, ranks=ranks),
                cwd=ROOT, env=environment(ORDERED_BY=str(os.getpid())), stdout=subprocess.DEVNULL, stderr=stderr,
            )  # fmt: skip

    def train(self, runs: Sequence[tuple[Path, Sequence[str]]], timeout: float) -> None:
        """Train all of `runs`. Raises AssertionError with the end of stderr if the job ends or is not done in time."""
        self._number += 1
        self._write([[str(path), list(overrides)] for path, overrides in runs])
        done, deadline = self._orders / f"{self._number}.done", time.monotonic() + timeout
        while not done.exists():
            ended = self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                what = "ended" if ended else f"was not done in {timeout:.0f} s"
                raise AssertionError(f"the job {what}:\n{(self._orders / 'stderr').read_text()[-4000:]}")
            time.sleep(0.02)

    def close(self) -> None:
        """Let the ranks go home, and wait until they are gone; a job that is in the middle of something is killed."""
        self._number += 1
        self._write(None)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its ranks die with it
            self._process.wait()
        shutil.rmtree(self._orders, ignore_errors=True)

    def _write(self, order: object) -> None:
        staging = self._orders / "order"
        staging.write_text(json.dumps(order))
        staging.rename(self._orders / f"{self._number}.json")


_JOBS: dict[int, TrainingJob] = {}


def _job(ranks: int) -> TrainingJob:
    if not _JOBS:
        atexit.register(_close_jobs)
    if ranks not in _JOBS:
        _JOBS[ranks] = TrainingJob(ranks)
    return _JOBS[ranks]


def _close_jobs() -> None:
    while _JOBS:
        _JOBS.popitem()[1].close()


def run_trainings(
    runs: Sequence[tuple[Path, Sequence[str]]],
    *,
    ranks: int,
    timeout: float = 280,
    seam: str = "",
    new_process: bool = False,
) -> None:
    """Train several (config file, overrides) one after the other in one job of `ranks` ranks, which is kept for later.

    `seam`: a change to make in the processes before (tests/dist/seams.py). Such a job is of this call alone, and so is
    one with `new_process`: for runs that must go on from nothing but what is in their folder.
    """
    own = TrainingJob(ranks, seam) if seam or new_process or not ranks else None
    job = own or _job(ranks)
    try:
        job.train(runs, timeout)
    except BaseException:
        if own is None:
            del _JOBS[ranks]
            job.close()
        raise
    finally:
        if own is not None:
            own.close()


def rows(run_dir: Path) -> list[dict[str, object]]:
    """All metric rows of a run."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    """Training loss of every step."""
    return [float(row["loss"]) for row in rows(run_dir) if "loss" in row]  # type: ignore[arg-type]


TIMED = ("time/", "tokens_per_s", "mfu", "memory/")


def deterministic(run_dir: Path) -> list[dict[str, object]]:
    """All metric rows without what depends on the clock."""
    return [{key: value for key, value in row.items() if not key.startswith(TIMED)} for row in rows(run_dir)]
