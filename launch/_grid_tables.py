"""A grid for the terminal: what its runs will take, how they stand, and what came out."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from configs.grid_loader import Grid, GridRun
from configs.schema import RunConfig
from launch._grid_metrics import Evaluations, step_seconds
from launch._grid_state import RunState, has_begun
from moe.arithmetic import count_parameters, flops_per_token
from trainer.data.prepare import read_manifest

_ADAM_BYTES = 12  # of each parameter in a checkpoint: its float32 weight and two moments (trainer/optimizer_state.py)


def plan_table(grid: Grid, states: Mapping[str, RunState], *, seconds_per_step: float | None, parallel: int) -> Table:
    """What each run takes. Time is known from `seconds_per_step`, or from runs of the grid that have been measured:
    then others are taken to need time in proportion to their FLOPs."""
    per_flop = _seconds_per_flop(grid) if seconds_per_step is None else None
    table = Table(title=f"{grid.name}: {len(grid.variants)} variants, {len(grid.runs)} runs in {grid.folder}")
    table.add_column("run", no_wrap=True)
    for title in ("status", "parameters", "active", "tokens", "FLOPs", "checkpoints", "time"):
        table.add_column(title, justify="right")
    totals = [0.0, 0.0, 0.0, 0.0]
    for run in grid.runs:
        config, vocab_size = run.config, _vocab_size(run.config)
        count = count_parameters(config.model, vocab_size)
        step_flops = _step_flops(config)
        tokens = _step_tokens(config) * config.train.steps
        disk = checkpoint_bytes(config, count.num_total)
        step_s = seconds_per_step if seconds_per_step is not None else per_flop and per_flop * step_flops
        seconds = step_s * config.train.steps if step_s else math.nan
        status = states.get(run.name, RunState()).status
        table.add_row(
            run.name, status, _big(count.num_total), _big(count.num_active), _big(tokens),
            f"{step_flops * config.train.steps:.2e}", f"{disk / 2**30:,.2f} GiB", _time(seconds),
        )  # fmt: skip
        is_ahead = status not in ("done", "stopped")
        for place, value in enumerate((tokens, step_flops * config.train.steps, disk, seconds if is_ahead else 0.0)):
            totals[place] += value
    table.add_section()
    all_tokens, flops, all_disk, left_s = totals
    table.add_row(
        "all", "", "", "", _big(all_tokens), f"{flops:.2e}", f"{all_disk / 2**30:,.2f} GiB",
        _time(left_s / max(parallel, 1)),
    )  # fmt: skip
    source = "--seconds-per-step" if seconds_per_step is not None else "runs measured so far"
    known = f"Time of all: what is left, {parallel} at a time, from {source}."
    unknown = "Time is not known: no run of this grid has been measured; --seconds-per-step says what a step takes."
    halved = " Runs that are stopped at a rung take less." if grid.config.halving.rungs else ""
    table.caption = (unknown if math.isnan(left_s) else known) + halved
    return table


def checkpoint_bytes(config: RunConfig, num_parameters: int) -> float:
    """Disk for a run's checkpoints while it saves one: those it keeps and the one being written."""
    weights = 2 if config.engine.precision == "bf16" else 4
    return num_parameters * (weights + _ADAM_BYTES) * (config.checkpoint.keep + 1)


def status_table(grid: Grid, states: Mapping[str, RunState]) -> Table:
    """How the runs stand."""
    table = Table(title=f"{grid.name} in {grid.folder}")
    table.add_column("run", no_wrap=True)
    for title in ("status", "starts", "exit code", "time"):
        table.add_column(title, justify="right")
    table.add_column("reason")
    for run in grid.runs:
        state = states.get(run.name, RunState())
        code = "" if state.exit_code is None else str(state.exit_code)
        table.add_row(run.name, state.status, str(state.attempts), code, _time(state.seconds), state.reason)
    return table


def result_table(grid: Grid, states: Mapping[str, RunState]) -> Table:
    """Mean and standard deviation over the seeds of finished runs; differences to the baseline are of paired seeds,
    with their standard error."""
    ends = {run.name: _end(run) for run in grid.runs if states[run.name].status == "done"}
    baseline = grid.config.baseline
    table = Table(title=f"{grid.name}: means over seeds")
    table.add_column("variant", no_wrap=True)
    table.add_column("runs", justify="right")
    table.add_column("held-out loss", justify="right")
    if baseline:
        table.add_column(f"minus {baseline}", justify="right")
    table.add_column("MaxVio_global", justify="right")
    if baseline:
        table.add_column(f"minus {baseline}", justify="right")
    for variant in grid.variants:
        runs = grid.runs_of(variant.name)
        cells = [variant.name, f"{sum(run.name in ends for run in runs)}/{len(runs)}"]
        for key, digits in (("eval/loss", 4), ("eval/maxvio_global", 3)):
            own = _by_seed(runs, ends, key)
            cells.append(_mean(list(own.values()), digits))
            if baseline:
                other = _by_seed(grid.runs_of(baseline), ends, key)
                paired = [own[seed] - other[seed] for seed in own if seed in other]
                cells.append("" if variant.name == baseline else _difference(paired, digits))
        table.add_row(*cells)
    table.caption = "± is the standard deviation over seeds; of differences, of pairs of one seed, the standard error."
    return table


def _end(run: GridRun) -> dict[str, float]:
    rows = Evaluations(run.folder).read()
    last = rows[-1] if rows else {}
    return {key: last[key] for key in ("eval/loss", "eval/maxvio_global") if last.get(key) is not None}


def _by_seed(runs: Sequence[GridRun], ends: Mapping[str, dict[str, float]], key: str) -> dict[int, float]:
    return {run.seed: ends[run.name][key] for run in runs if key in ends.get(run.name, {})}


def _mean(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def _difference(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.{digits}f}{error}"


def _seconds_per_flop(grid: Grid) -> float | None:
    found = []
    for run in grid.runs:
        step_s = step_seconds(run.folder) if has_begun(run) else None
        if step_s is not None:
            found.append(step_s / _step_flops(run.config))
    return statistics.median(found) if found else None


def _step_tokens(config: RunConfig) -> int:
    return config.train.global_batch_size * config.train.sequence_length


def _step_flops(config: RunConfig) -> float:
    return flops_per_token(config.model, _vocab_size(config), config.train.sequence_length) * _step_tokens(config)


def _vocab_size(config: RunConfig) -> int:
    manifest = read_manifest(Path(config.data.path))
    return int(manifest["tokenizer"]["vocab_size"]) if manifest else config.data.vocab_size


def _big(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def _time(seconds: float) -> str:
    if math.isnan(seconds):
        return "?"
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 36000 else f"{seconds / 3600:,.1f} h"
