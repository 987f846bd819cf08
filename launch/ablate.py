"""Run a grid of configurations: `python -m launch.ablate configs/grids/ablation-demo.yaml [key=value ...]`.

A grid file names a base configuration, what varies, and seeds; launch/ABLATIONS.md explains it. Every run is an
ordinary run folder below runs/<grid>/. All configurations are checked before anything starts; text that is not there
yet is prepared; then runs are started here, as many at a time as fit, each on cores and GPUs of its own, and when all
have ended a table compares the variants. Ctrl-C or SIGTERM lets running runs save; running the same grid again, also
after a kill or a power cut, continues it: finished runs stay, others resume, failed ones are tried again.

Exit codes: 0 every run is done (or was stopped by halving), 1 some run failed for good (state.json and the output of
each say why), 2 configuration, 3 the folder is in use or damaged, 6 storage, 75 interrupted and saved.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from configs.grid_loader import Grid, load_grid
from launch._cli import run_command
from launch._console import terminal
from launch._folder_lock import folder_holder
from launch._grid_runner import GridRunner, StopRequest
from launch._grid_slots import kill_tree, make_slots, start, usable_cpus, usable_gpus
from launch._grid_slurm import array_script
from launch._grid_state import CONFIG, OUTPUT, GridFolder, RunState, observed, read_states
from launch._grid_tables import plan_table, result_table, status_table
from trainer.data.prepare import read_manifest
from trainer.errors import PREEMPTED_EXIT_CODE, ConfigError, StorageError

FAILED_EXIT_CODE = 1


def main(argv: list[str]) -> int:
    """Run a grid, or say what it would take; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", help="YAML file, for instance configs/grids/ablation-demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of all runs, for instance train.steps=100")
    parser.add_argument(
        "--parallel",
        type=int,
        default=0,
        metavar="N",
        help="runs at a time (default: one GPU or core a rank, all used)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="list the runs and what they take; start nothing")
    what.add_argument("--status", action="store_true", help="list the runs as they stand, wherever they run")
    what.add_argument("--slurm", type=Path, metavar="FILE", help="write a script for sbatch instead of running here")
    parser.add_argument(
        "--seconds-per-step",
        type=float,
        metavar="S",
        help="with --dry-run: time of a step, if no run has been measured",
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.parallel < 0:
        raise ConfigError(f"--parallel: {arguments.parallel} is negative; use 0 for as many as fit")
    if arguments.seconds_per_step is not None and not (arguments.dry_run and arguments.seconds_per_step > 0):
        raise ConfigError("--seconds-per-step: needs --dry-run, and a time that is positive")

    grid = load_grid(arguments.grid, arguments.overrides)
    console = terminal()
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a log has room for whole names
    if arguments.dry_run:
        parallel = arguments.parallel or 1
        states = _current_states(grid)
        console.print(plan_table(grid, states, seconds_per_step=arguments.seconds_per_step, parallel=parallel))
        return 0
    if arguments.status:
        states = _current_states(grid)
        console.print(status_table(grid, states))
        console.print(result_table(grid, states))
        return 0
    if arguments.slurm is not None:
        return _write_array(grid, arguments.slurm, arguments.parallel, console)
    return _run(grid, arguments.parallel, console)


def _run(grid: Grid, parallel: int, console: Console) -> int:
    ranks, num_runs = grid.config.ranks, len(grid.runs)
    slots = make_slots(parallel, ranks=ranks, num_runs=num_runs, cpus=usable_cpus(), gpus=usable_gpus())

    def say(line: str) -> None:
        console.print(f"{time.strftime('%H:%M:%S')} {line}", highlight=False, soft_wrap=True)

    with StopRequest().installed() as stop, GridFolder(grid) as folder:
        left = sum(state.status == "waiting" for state in folder.states.values())
        say(f"{grid.name}: {num_runs} runs, {left} to do, {len(slots)} at a time, in {grid.folder}")
        if left:
            code = _prepare_corpora(grid, stop)
            if code:
                return code
            GridRunner(folder, slots, stop, say).run()
        states = folder.states
    if any(state.status == "waiting" for state in states.values()):
        say(f"interrupted: everything is saved in {grid.folder}; run the same command again to continue")
        return PREEMPTED_EXIT_CODE
    console.print(result_table(grid, states))
    failed = [name for name, state in states.items() if state.status == "failed"]
    for name in failed:
        state = states[name]
        line = f"failed: {name} (exit code {state.exit_code}): {state.reason}; see {grid.folder / name / OUTPUT}"
        console.print(line, highlight=False, soft_wrap=True)
    return FAILED_EXIT_CODE if failed else 0


def _prepare_corpora(grid: Grid, stop: StopRequest) -> int:
    """Prepare the text of every run, once for each folder of it; returns the exit code of what failed, or 0."""
    paths = {run.config.data.path: run for run in reversed(grid.runs)}
    for path, run in paths.items():
        if read_manifest(Path(path)) is not None:
            continue
        process = start(["launch.prepare", str(run.folder / CONFIG)], None)
        while True:
            try:
                code = process.wait(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                if stop.times:  # it goes on where it was, whenever it ends
                    kill_tree(process.pid)
        if stop.times:
            return PREEMPTED_EXIT_CODE
        if code:
            return code if code > 0 else FAILED_EXIT_CODE
    return 0


def _write_array(grid: Grid, file: Path, parallel: int, console: Console) -> int:
    with GridFolder(grid) as folder:
        runs = [run for run in grid.runs if folder.states[run.name].status == "waiting"]
        script = array_script(grid, runs, parallel=parallel, python=sys.executable)
        try:
            file.write_text(script)
        except OSError as error:
            raise StorageError(f"{file}: {error.strerror}; name a file that can be written") from error
    console.print(f"{file}: {len(runs)} tasks; prepare the text (launch.prepare), then sbatch {file}", highlight=False)
    return 0


def _current_states(grid: Grid) -> dict[str, RunState]:
    """States as the folder has them; where no ablate runs the grid, as the runs' own folders show them."""
    states = read_states(grid.folder)
    found = {run.name: states.get(run.name, RunState()) for run in grid.runs}
    if not folder_holder(grid.folder):
        for run in grid.runs:
            if found[run.name].status in ("waiting", "running"):
                found[run.name].status = observed(run)
    return found


if __name__ == "__main__":
    sys.exit(run_command(main))
