"""A grid as one Slurm array: a task a run, each an ordinary run folder that a requeued task resumes."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from configs.grid_loader import Grid, GridRun
from launch._cluster_plan import Agents, exports
from launch._cluster_slurm import HEAD_NODE, ON_NODE, common_directives, job, limit_seconds
from trainer.errors import ConfigError

_GRACE_S, _JOIN_TIMEOUT_S = 300, 600  # as launch.cluster has them


def array_script(grid: Grid, runs: Sequence[GridRun], *, parallel: int, python: str) -> str:
    """The script for `sbatch`. `parallel` tasks run at a time, 0 for no limit.

    Raises ConfigError if the grid cannot be run without somebody to watch all of it, or not on that many nodes, or not
    in that time.
    """
    config = grid.config
    if config.halving.rungs:
        raise ConfigError(
            "halving.rungs: tasks of an array do not wait for each other; remove it, or run the grid without --slurm"
        )
    if not runs:
        raise ConfigError(f"--slurm: every run of {grid.folder} is done")
    nodes = str(config.slurm.get("nodes", 1))
    if not nodes.isdigit() or not int(nodes) or config.ranks % int(nodes):
        raise ConfigError(f"slurm.nodes: {nodes} does not divide ranks ({config.ranks})")
    limit = config.slurm.get("time")
    if limit is not None and limit_seconds(str(limit), "slurm.time") <= _GRACE_S:
        raise ConfigError(f"slurm.time: {limit} leaves no time to train before the {_GRACE_S} s that saving may take")
    agents = Agents(
        nodes=int(nodes), ranks_per_node=config.ranks // int(nodes), max_restarts=config.retries,
        join_timeout_s=_JOIN_TIMEOUT_S, grace_s=_GRACE_S, python=python,
    )  # fmt: skip
    directives = [
        f"job-name={shlex.quote(grid.name)}",
        f"array=0-{len(runs) - 1}" + (f"%{parallel}" if parallel else ""),
        f"output={_sbatch_path(f'{Path(grid.folder).absolute()}/slurm-%A_%a.txt')}",
        *common_directives(agents),
        *(f"{name}={value}" for name, value in config.slurm.items()),
    ]
    agent = agents.command('"$run/config.yaml"', endpoint=f'{HEAD_NODE}:"$port"', **ON_NODE)
    return f"""\
#!/bin/bash
# {len(runs)} runs of {grid.name}, a task each. Written by launch.ablate; start with sbatch.
{"".join(f"#SBATCH --{each}{chr(10)}" for each in directives)}
set -euo pipefail
cd {shlex.quote(os.getcwd())}
{exports(agents.environment())}
runs=(
{"".join(f"    {shlex.quote(str(run.folder))}{chr(10)}" for run in runs)})
export run=${{runs[$SLURM_ARRAY_TASK_ID]}}
export port=$((20000 + SLURM_JOB_ID % 20000))  # tasks of an array share nodes

{job(agents, agent)}"""


def _sbatch_path(path: str) -> str:
    # A #SBATCH line is not read by a shell, but sbatch splits it at blanks and takes quotes.
    return f'"{path}"' if any(character.isspace() for character in path) else path
