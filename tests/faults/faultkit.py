"""Start a training with a fault in it (tests/faults/worker.py), watch it end, and look at what it leaves."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.harness import ROOT, command, deterministic, environment

KEEP = 3  # checkpoints
TIMEOUT_S = 8.0  # of a collective, in every configuration here
Record = Callable[[str, object], None]
"""pytest's record_property."""


@dataclass(frozen=True)
class Reference:
    """A run that nothing happened to, and the configuration to repeat it with."""

    config: Path
    run_dir: Path


class Job:
    """A training in a process group of its own, whose stderr is read line by line with the time of each."""

    def __init__(
        self, config: Path, run_dir: Path, *overrides: str, ranks: int, fault: str = "", torchrun: str = "", **env: str
    ) -> None:
        """`torchrun`: further options of the launcher, in one string."""
        line = command("tests.faults.worker", str(config), f"run_dir={run_dir}", *overrides, ranks=ranks)
        if torchrun:
            line[3:3] = torchrun.split()
        self._start(line, run_dir, environment(FAULT=fault, **env))

    def _start(self, line: list[str], run_dir: Path, env: dict[str, str]) -> None:
        self.run_dir = run_dir
        self.lines: list[tuple[float, str]] = []
        self._process = subprocess.Popen(
            line, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.lines.append((time.monotonic(), line.rstrip()))

    @property
    def log(self) -> str:
        """All of stderr so far."""
        return "\n".join(line for _, line in self.lines)

    @property
    def errors(self) -> list[str]:
        """The one-line causes, those of peers that only noticed last."""
        found = [line for _, line in self.lines if line.startswith("error")]
        return sorted(found, key=lambda line: "another rank is gone" in line)

    def when(self, text: str, timeout: float = 90) -> float:
        """Wait until a line holds `text`; the time it came."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for moment, line in list(self.lines):
                if text in line:
                    return moment
            assert self._process.poll() is None or self._reader.is_alive(), f"{text!r} never came:\n{self.log[-3000:]}"
            time.sleep(0.02)
        raise AssertionError(f"no {text!r} within {timeout} s:\n{self.log[-3000:]}")

    def send(self, number: signal.Signals, *, to: str = "launcher") -> None:
        """A signal to the launcher, to all ranks, or to everything."""
        ranks = psutil.Process(self._process.pid).children(recursive=True)
        if to in ("ranks", "all"):
            for process in ranks:
                process.send_signal(number)
        if to in ("launcher", "all"):
            self._process.send_signal(number)

    def kill_frozen(self) -> None:
        """End the ranks that SIGSTOP holds."""
        for process in psutil.Process(self._process.pid).children(recursive=True):
            if process.status() == psutil.STATUS_STOPPED:
                process.kill()

    def end(self, timeout: float = 90) -> int:
        """Wait for the exit code; nothing of the job may be left."""
        try:
            code = self._process.wait(timeout)
        finally:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._reader.join(10)
        deadline = time.monotonic() + 5  # the kernel takes a moment to bury the ranks of a killed launcher
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"orphans: {left}"
        return code

    def left(self) -> list[str]:
        """What still lives of the job."""
        return processes_of(self.run_dir)


def processes_of(run_dir: Path) -> list[str]:
    """Command lines of living processes that work on `run_dir`."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and f"run_dir={run_dir}" in words:
            found.append(" ".join(words))
    return found


def checkpoints(run_dir: Path) -> list[int]:
    """Steps of the published checkpoints, in order."""
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*"))


def leftovers(run_dir: Path) -> list[str]:
    """Folders of checkpoints that were never published."""
    return [path.name for path in (run_dir / "checkpoints").glob("tmp-*")]


def assert_begins_like(rows: list[dict[str, object]], expected: Path) -> None:
    """Every metric on record so far is that of the unbroken run, bit for bit."""
    assert rows == deterministic(expected)[: len(rows)]


def on_record(run_dir: Path) -> list[dict[str, object]]:
    """What the metrics file holds but for times; nothing if there is none yet."""
    return deterministic(run_dir) if (run_dir / "metrics.jsonl").exists() else []


def lost_steps(run_dir: Path) -> int:
    """Steps on record that come after the newest checkpoint: those a new start does again."""
    steps = sum("loss" in row for row in on_record(run_dir))
    return max(steps - max(checkpoints(run_dir), default=0), 0)


@dataclass(frozen=True)
class Leg:
    """One start of a run, and what is to go wrong in it."""

    fault: str = ""
    act: Callable[[Job], None] = lambda job: None
    """What the test does to the job from outside; called once the fault has been announced."""
    torchrun: str = ""
    overrides: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a leg ended and what it left."""

    code: int
    job: Job
    detected_in: float
    """Seconds from the fault to the end of the whole job."""
    lost: int
    before: dict[int, str]
    """Digest of each checkpoint before the leg, by step."""
    after: dict[int, str]
    rows: list[dict[str, object]]

    def assert_kept(self) -> None:
        """Checkpoints of before are what they were, and the newest of them went only for KEEP newer ones."""
        kept = self.before.keys() & self.after.keys()
        assert all(self.before[step] == self.after[step] for step in kept)
        if self.before and max(self.before) not in kept:
            assert sum(step > max(self.before) for step in self.after) == KEEP


def strike(config: Path, run_dir: Path, legs: Mapping[str, Leg], *, ranks: int) -> dict[str, Outcome]:
    """Start one run again and again, each time with the next fault, and a last time with none (under the name "end").

    Every start is the resume of the fault before it, so that a fault costs one start and not two.
    """
    outcomes = {}
    for name, leg in [*legs.items(), ("end", Leg())]:
        before = digests(run_dir)
        job = Job(config, run_dir, *leg.overrides, ranks=ranks, fault=leg.fault, torchrun=leg.torchrun, **leg.env)
        struck = job.when("fault:") if leg.fault else time.monotonic()
        leg.act(job)
        code = job.end()
        outcomes[name] = Outcome(
            code, job, time.monotonic() - struck, lost_steps(run_dir), before, digests(run_dir), on_record(run_dir)
        )
        sys.stdout.write(f"{name}: exit {code}, checkpoints {checkpoints(run_dir)}\n{job.log}\n")
    return outcomes


def digests(run_dir: Path) -> dict[int, str]:
    """One hash over all names and bytes of each checkpoint, by step."""
    found = {}
    for step in checkpoints(run_dir):
        sha = hashlib.sha256()
        for path in sorted((run_dir / "checkpoints" / f"step-{step:08d}").iterdir()):
            sha.update(path.name.encode() + path.read_bytes())
        found[step] = sha.hexdigest()
    return found
