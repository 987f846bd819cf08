"""Where the time of a step goes: `python -m launch.profile configs/quickstart.yaml [--steps 20] [key=value ...]`.

Runs a few steps of the real loop on the real data, with every part of the step timed, and prints a table; the same as a
flame graph down to torch's operations is written to profile.html, the figures to profile.json. A run folder in place of
the config takes its configuration and the weights of its newest checkpoint: routing is then as uneven as it is there.

Works in one process or under torchrun, on CPU and CUDA. Nothing is trained that is kept, nothing is evaluated or saved.
Asked to stop (SIGTERM) it ends with 75 and writes nothing.
"""

import argparse
import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from configs.loader import load_run_config
from configs.schema import RunConfig
from launch import _step_profile
from launch._bias_kind import refuse_other_bias
from launch._cli import run_command
from launch._console import terminal
from launch._corpus import open_corpus
from launch._identity import identity
from launch._out_of_memory import explained_out_of_memory
from launch._run_folder import start_logging
from launch.train import assemble, build
from trainer import ranks
from trainer.checkpoint import CheckpointStore
from trainer.engine import Engine
from trainer.errors import PREEMPTED_EXIT_CODE, ConfigError, StorageError
from trainer.hooks import HookList
from trainer.loop import StopSignal
from trainer.metrics import Row
from trainer.phases import PhaseClock
from trainer.process_group import leave, start_process_group, stop_process_group
from trainer.profiling import ProfileConfig, StepProfiler
from trainer.train_state import TrainState

log = logging.getLogger("evenkeel")


def main(argv: list[str]) -> int:
    """Profile; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="CONFIG|RUN", help="YAML file or run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance train.micro_batch_size=8")
    parser.add_argument("--steps", type=int, default=10, help="steps to measure (default 10)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before, which are not counted (default 3)")
    parser.add_argument("--out", type=Path, help="folder to write to (default: RUN/profile, or runs/NAME/profile)")
    arguments = parser.parse_intermixed_args(argv)
    for name in ("steps", "warmup"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name}: {getattr(arguments, name)} must be at least 1")

    run_dir = arguments.source if arguments.source.is_dir() else None
    path = arguments.source / "config.yaml" if run_dir else arguments.source
    config = load_run_config(path, arguments.overrides, world_size=ranks.world_size())
    if config.model.compile:
        raise ConfigError("model.compile: its regions cannot be divided into parts; profile with model.compile=false")
    out = arguments.out or (run_dir or Path(config.folder)) / "profile"
    start_process_group(config.engine.collective_timeout_s)
    _open(out)
    start_logging(out)
    profile = measure(config, run_dir, out, steps=arguments.steps, warmup=arguments.warmup)
    if profile is None:
        log.warning("stopped before all steps were measured; %s has no new profile", out)
        return PREEMPTED_EXIT_CODE
    everywhere = ranks.gather_objects(profile)
    stop_process_group()
    if ranks.is_main():
        _show(_step_profile.mean_over_ranks(everywhere), config, out)
    return 0


def measure(
    config: RunConfig, run_dir: Path | None, out: Path, *, steps: int, warmup: int
) -> _step_profile.StepProfile | None:
    """Run `warmup` + `steps` + 1 steps, the last one with torch's profiler. This rank's mean step; None if asked to
    stop before, which all ranks agree on."""
    corpus = open_corpus(config)
    original, total = config, warmup + steps + 1
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=total, write_every=1),
        evaluation=dataclasses.replace(config.evaluation, every=0, max_rows=1),
        checkpoint=dataclasses.replace(config.checkpoint, every=0),
        profile=ProfileConfig(),
    )
    with explained_out_of_memory(config, out):
        engine, hooks, run = build(config, corpus, out)
        corpus.plan.require(total * config.train.global_batch_size)
        timeout_s = config.engine.collective_timeout_s
        if run_dir is not None:
            saved = CheckpointStore(
                run_dir, config.checkpoint, identity(original, corpus.fingerprint), timeout_s=timeout_s
            )
            restored = saved.load_newest(engine, hooks)
            refuse_other_bias(run_dir, restored, run.model)
            if restored is None and ranks.is_main():
                log.warning("%s has no checkpoint: these are steps of the initial weights", run_dir)
        rows = _Rows()
        store = _NothingSaved(out, config.checkpoint, {}, timeout_s=timeout_s)
        trainer = assemble(config, corpus, out, engine, hooks, run, store, TrainState(), rows.write, StopSignal())
        recorder = trainer.profiler = _StepRecorder(engine, trainer.telemetry.clock, out, step=total)
        if trainer.train() != "done":
            return None
    measured = slice(warmup, warmup + steps)
    profile = _step_profile.step_profile(rows.rows[measured], rows.seconds(measured))
    profile.operations = recorder.operations
    return profile


class _Rows:
    """Keeps the rows of steps, and when each came."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._at: list[float] = []

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            if "loss" in row:
                self.rows.append(dict(row))
                self._at.append(time.perf_counter())

    def seconds(self, which: slice) -> float:
        """From the end of the step before the first of these to the end of the last."""
        return self._at[which.stop - 1] - self._at[which.start - 1]


class _NothingSaved(CheckpointStore):
    """The loop saves when it ends; these steps are not worth it."""

    def save(self, engine: Engine, hooks: HookList, state: TrainState, *, wait: bool = False) -> None:
        pass


class _StepRecorder(StepProfiler):
    """The parts of all steps, and torch's operations of one."""

    def __init__(self, engine: Engine, clock: PhaseClock, out: Path, *, step: int) -> None:
        super().__init__(
            ProfileConfig(breakdown=True, trace_steps=(step,), trace_ranks=(ranks.rank(),)), engine, clock, out
        )
        self.operations: dict[str, dict[str, float]] = {}

    def end_step(self, step: int) -> None:
        """Keep shares of operations in place of a file."""
        if self._trace is None:
            return
        self._clock.is_traced = False
        self._trace.stop()
        on_cuda = ProfilerActivity.CUDA in self._trace.activities
        self.operations = _step_profile.operations_by_part(self._trace.events() or [], on_cuda=on_cuda)
        self._trace = None


def _open(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"--out: {out}: {error.strerror}; choose another folder") from error


def _show(profile: _step_profile.StepProfile, config: RunConfig, out: Path) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    place = f"{ranks.world_size()} x {device}, {config.engine.precision}, ZeRO {config.engine.zero_stage}"
    title = f"a step of {config.name}: {place}"
    note = (
        f"Mean of {profile.steps} steps of {profile.total * 1e3:.1f} ms, {profile.tokens_per_s:,.0f} tokens/s. Widths "
        "are times of steps without a profiler; torch's operations, from one more step with it, divide the parts by "
        "their shares."
    )
    console = terminal()
    console.print(_step_profile.table(profile, title))
    console.print(f"{profile.tokens_per_s:,.0f} tokens/s; {out}/profile.html is the flame graph", highlight=False)
    facts = {"title": title, "torch": torch.__version__, "total_s": profile.total}
    try:
        (out / "profile.html").write_text(_step_profile.page(profile, title, note))
        (out / "profile.json").write_text(json.dumps(facts | dataclasses.asdict(profile), indent=1))
    except OSError as error:
        raise StorageError(f"{out}: {error.strerror}; free space or make it writable") from error


if __name__ == "__main__":
    leave(run_command(main))
