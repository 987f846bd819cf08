"""Runs of a grid on this machine: started where there is room, watched, tried again, and stopped in good order.

    each turn: take note of runs that ended -> compare variants at a rung -> start what has room

Decisions:
- Runs are ordinary `launch.train` processes of a run folder each; a run that ends early is simply started again.
- What failed by its settings (exit codes 2, 3, 4) fails again: only other failures are retried.
- Being asked to stop is no failure: runs get SIGTERM, save, and wait for the next start of the grid.
"""

import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from configs.grid_loader import GridRun
from launch._folder_lock import folder_holder
from launch._grid_halving import Halving
from launch._grid_metrics import Evaluations
from launch._grid_slots import Slot, kill_tree, start
from launch._grid_state import CONFIG, OUTPUT, GridFolder, RunState
from trainer.errors import PREEMPTED_EXIT_CODE, CheckpointError, ConfigError, NumericError

_POLL_S = 0.2
_GRACE_S = 600.0  # for a step and a checkpoint of a large model
_ORPHAN_S = 120.0
_ASKED_TO_END = (PREEMPTED_EXIT_CODE, -signal.SIGTERM, 128 + signal.SIGTERM)  # the others: before it could listen
_BY_ITS_SETTINGS = (ConfigError.exit_code, CheckpointError.exit_code, NumericError.exit_code)


class StopRequest:
    """Remembers that SIGTERM, SIGINT or SIGHUP came; the second one is a demand."""

    def __init__(self) -> None:
        self.times = 0

    @contextmanager
    def installed(self) -> Iterator["StopRequest"]:
        """Listen while the context lasts."""
        heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
        before = {number: signal.signal(number, self._on_signal) for number in heard}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.times += 1


_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass
class _Active:
    """A run that is running."""

    run: GridRun
    slot: Slot
    process: "subprocess.Popen[bytes]"
    since: float
    output_start: int
    """Bytes of its output that are of earlier starts."""
    parked: bool = False
    """Whether it was asked to save and wait at a rung."""


class GridRunner:
    """Runs what is left of a grid."""

    def __init__(
        self, folder: GridFolder, slots: Sequence[Slot], stop: StopRequest, say: Callable[[str], None]
    ) -> None:
        self._folder, self._grid, self._states = folder, folder.grid, folder.states
        self._free = list(slots)
        self._stop, self._say = stop, say
        self._active: list[_Active] = []
        self._is_winding_up = False
        self._failures: Counter[str] = Counter()
        self._halving = Halving(folder.grid)
        self._evaluations = {run.name: Evaluations(run.folder) for run in folder.grid.runs}

    def run(self) -> None:
        """Run everything that can be run, or until asked to stop. Afterwards no run is running."""
        self._wait_for_orphans()
        try:
            while True:
                for active in [each for each in self._active if each.process.poll() is not None]:
                    self._ended(active)
                if self._stop.times:
                    break
                self._compare()
                self._start_what_fits()
                if not self._active:
                    return
                time.sleep(_POLL_S)
        finally:
            self._wind_up()

    def _start_what_fits(self) -> None:
        for run in self._grid.runs:
            if not self._free:
                return
            if self._states[run.name].status == "waiting" and not self._is_at_rung(run):
                self._start(run, self._free.pop(0))

    def _start(self, run: GridRun, slot: Slot) -> None:
        state = self._states[run.name]
        state.status, state.reason = "running", ""
        state.attempts += 1
        self._folder.save()
        self._evaluations[run.name].rewind()
        output = run.folder / OUTPUT
        begin = output.stat().st_size if output.exists() else 0
        process = start(command(run, self._grid.config.ranks), output, slot)
        self._active.append(_Active(run, slot, process, time.monotonic(), begin))
        again = f" (start {state.attempts})" if state.attempts > 1 else ""
        self._say(f"{run.name}: started{again}")

    def _ended(self, active: _Active) -> None:
        run, state = active.run, self._states[active.run.name]
        self._active.remove(active)
        self._free.append(active.slot)
        code = state.exit_code = active.process.returncode
        state.seconds = round(state.seconds + time.monotonic() - active.since, 1)
        if code == 0:
            state.status = "done"
            self._say(f"{self._count()} {run.name}: done in {state.seconds:.0f} s{self._result(run)}")
        elif self._is_winding_up or self._stop.times or (active.parked and code in _ASKED_TO_END):
            state.status = "waiting"
            self._say(f"{run.name}: {'saved' if code == PREEMPTED_EXIT_CODE else 'ended'}, waits")
        else:
            self._failed(active, state, code)
        self._mark_stopped()
        self._folder.save()

    def _failed(self, active: _Active, state: RunState, code: int) -> None:
        run = active.run
        state.reason = last_words(run.folder / OUTPUT, active.output_start)
        self._failures[run.name] += 1
        left = self._grid.config.retries - self._failures[run.name]
        if code in _BY_ITS_SETTINGS or left < 0:
            state.status = "failed"
            self._say(f"{self._count()} {run.name}: FAILED with {_ending(code)}: {state.reason}")
        else:
            state.status = "waiting"
            self._say(f"{run.name}: ended with {_ending(code)} and is tried again: {state.reason}")

    def _is_at_rung(self, run: GridRun) -> bool:
        """Whether the run must wait for others before it may go on."""
        return self._halving.rung is not None and self._value(run) is not None

    def _value(self, run: GridRun) -> float | None:
        assert self._halving.rung is not None
        return self._evaluations[run.name].at(self._halving.rung, self._halving.metric)

    def _compare(self) -> None:
        """Halve the variants if all have reached the rung; ask runs that are there before the others to wait."""
        while self._halving.rung is not None:
            runs = [run for run in self._grid.runs if run.variant in self._halving.contenders()]
            values = {run.name: self._value(run) for run in runs}
            missing = [run for run in runs if values[run.name] is None and self._states[run.name].status != "failed"]
            lost = [run for run in missing if self._states[run.name].status == "done"]
            if lost:
                raise CheckpointError(
                    f"{lost[0].folder}: is done, but its metrics have no evaluation at step {self._halving.rung}; "
                    "delete the folder to run it anew"
                )
            if missing:
                break
            by_variant: dict[str, dict[int, float]] = {name: {} for name in self._halving.contenders()}
            for run in runs:
                if (value := values[run.name]) is not None:
                    by_variant[run.variant][run.seed] = value
            decision = self._halving.settle(by_variant)
            stopped = ", ".join(decision.stopped) or "none"
            self._say(f"step {decision.rung}: {', '.join(decision.kept)} go on; stopped: {stopped}")
            self._mark_stopped()
            self._folder.save()
        for active in self._active:
            is_stopped = bool(self._halving.stopped_by(active.run.variant))
            if not active.parked and (is_stopped or self._is_at_rung(active.run)):
                active.parked = True
                active.process.send_signal(signal.SIGTERM)

    def _mark_stopped(self) -> None:
        for run in self._grid.runs:
            reason = self._halving.stopped_by(run.variant)
            if reason and self._states[run.name].status in ("waiting", "failed"):
                self._states[run.name].status, self._states[run.name].reason = "stopped", reason

    def _wind_up(self) -> None:
        """Let what is running save and end."""
        if not self._active:
            return
        self._is_winding_up = True
        self._say(
            f"stopping: {', '.join(each.run.name for each in self._active)} save and end (once more to kill them)"
        )
        for active in self._active:
            active.process.send_signal(signal.SIGTERM)
        deadline, asked = time.monotonic() + _GRACE_S, self._stop.times
        while self._active:
            if self._stop.times > asked or time.monotonic() > deadline:
                for active in self._active:
                    kill_tree(active.process.pid)
            for active in [each for each in self._active if each.process.poll() is not None]:
                self._ended(active)
            time.sleep(_POLL_S)

    def _wait_for_orphans(self) -> None:
        """Runs of an ablate that was killed have been told to save and end: let them."""
        deadline = time.monotonic() + _ORPHAN_S
        for run in self._grid.runs:
            if not run.folder.exists() or not (holder := folder_holder(run.folder)):
                continue
            self._say(f"{run.name}: waiting for {holder}, which is still writing there")
            while (holder := folder_holder(run.folder)) and not self._stop.times:
                if time.monotonic() > deadline:
                    raise CheckpointError(f"{run.folder} is in use by {holder}; stop it, then run the grid again")
                time.sleep(_POLL_S)

    def _count(self) -> str:
        over = sum(state.status in ("done", "failed", "stopped") for state in self._states.values())
        return f"[{over}/{len(self._states)}]"

    def _result(self, run: GridRun) -> str:
        rows = self._evaluations[run.name].read()
        if not rows or rows[-1]["eval/loss"] is None:
            return ""
        violation = rows[-1].get("eval/maxvio_global")
        shown = "" if violation is None else f", MaxVio_global {violation:.3f}"
        return f": held-out loss {rows[-1]['eval/loss']:.4f}{shown}"


def command(run: GridRun, ranks: int) -> list[str]:
    """Module and arguments that train a run."""
    train = ["launch.train", str(run.folder / CONFIG)]
    return train if ranks == 1 else ["launch.torchrun", "--standalone", f"--nproc_per_node={ranks}", "-m", *train]


def last_words(output: Path, begin: int) -> str:
    """The line of a run's output from byte `begin` that says why it ended: the last of ours, or else the last."""
    try:
        with output.open("rb") as file:
            file.seek(max(begin, output.stat().st_size - (1 << 16)))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    ours = [line for line in lines if line.startswith("error")]
    return (ours or lines or [""])[-1][:400]


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
