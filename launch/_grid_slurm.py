"""A grid as one Slurm array: a task a run, each an ordinary run folder that a requeued task resumes."""

import math
import shlex
from collections.abc import Sequence

from configs.grid_loader import Grid, GridRun
from trainer.errors import ConfigError

_SCRIPT = """#!/bin/bash
# Written by launch.ablate: one task for each run of the grid that is not done. Submit it from this folder:
#   sbatch {file}
#SBATCH --job-name={name}
#SBATCH --array=0-{last}{limit}
#SBATCH --output={output}
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=TERM@180
{options}
set -euo pipefail

RUNS=(
{runs}
)
RUN=${{RUNS[$SLURM_ARRAY_TASK_ID]}}
HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 20000))  # tasks of an array share nodes

code=0
srun {python} -m launch.torchrun \\
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node={ranks_per_node} \\
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$HEAD_NODE:$PORT" \\
    -m launch.train "$RUN/config.yaml" || code=$?
# 75: saved before the end of its time. The task is queued again and resumes.
if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""


def array_script(grid: Grid, runs: Sequence[GridRun], *, file: str, parallel: int, python: str) -> str:
    """The script for `sbatch`. `parallel` tasks run at a time, 0 for no limit.

    Raises ConfigError if the grid cannot be run without somebody to watch all of it, or not on that many nodes.
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
    options = "\n".join(f"#SBATCH --{name}={value}" for name, value in config.slurm.items())
    return _SCRIPT.format(
        file=shlex.quote(file),
        name=shlex.quote(grid.name),
        last=len(runs) - 1,
        limit=f"%{parallel}" if parallel else "",
        output=_sbatch_path(f"{grid.folder}/slurm-%A_%a.txt"),
        options=options,
        runs="\n".join(f"    {shlex.quote(str(run.folder))}" for run in runs),
        python=shlex.quote(python),
        ranks_per_node=math.ceil(config.ranks / int(nodes)),
    )


def _sbatch_path(path: str) -> str:
    # A #SBATCH line is not read by a shell, but sbatch splits it at blanks and takes quotes.
    return f'"{path}"' if any(character.isspace() for character in path) else path
