"""A batch script for Slurm: one agent on each node, warned ahead of the time limit, requeued when it has saved."""

import math
import shlex
from dataclasses import dataclass

from launch._cluster_plan import WAIT_FOR_CHILD, Plan, job_name, one_word
from trainer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What only Slurm knows."""

    time: str
    """Time limit, as sbatch takes it."""
    interface: str
    setup: tuple[str, ...]
    """Lines of bash to run first, as they are: modules, virtual environments."""
    directives: tuple[str, ...]
    """Further options of sbatch: `partition=gpu`, `account=x`, `exclusive`."""


def batch_script(plan: Plan, options: SlurmOptions) -> str:
    """The script, for sbatch. Raises ConfigError for a time limit or an option that sbatch would not understand."""
    if limit_seconds(options.time) <= plan.grace_s:
        raise ConfigError(
            f"--grace: {plan.grace_s} s ahead of a time limit of {options.time} leaves no time to train; lower it"
        )
    directives = [
        f"job-name={job_name(plan.config.name, 60)}",
        f"nodes={plan.nodes}",
        "ntasks-per-node=1",
        *([f"gpus-per-node={plan.ranks_per_node}"] if plan.has_gpus else []),
        f"time={options.time}",
        f"signal=B:USR1@{plan.grace_s}",
        "requeue",
        "open-mode=append",
        "output=%x-%j.log",
        *(one_word("--sbatch", each.removeprefix("--")) for each in options.directives),
    ]
    agent = plan.agent(
        run_id='"$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"',
        endpoint='"$head_node"',
        is_host='"$is_host"',
        local_addr='"$SLURMD_NODENAME"',
    )
    return f"""\
#!/bin/bash
# {plan.nodes} nodes, {plan.ranks_per_node} ranks on each. Written by python -m launch.cluster slurm; start with sbatch.
{"".join(f"#SBATCH --{each}{chr(10)}" for each in directives)}
set -euo pipefail
cd {shlex.quote(plan.workdir)}
{"".join(f"{line}{chr(10)}" for line in options.setup)}{plan.exports(options.interface)}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export head_node=${{hosts[0]}}

# Runs once on each node.
node() {{
    is_host=false
    if [[ $SLURM_NODEID == 0 ]]; then is_host=true; fi
    exec {_indent(agent)}
}}

# {plan.grace_s} s before the time limit Slurm tells this shell, and this shell the agents (and not srun, which may
# end them at once). They save and end with exit code 75. A job that is cancelled gets SIGTERM and is not started again.
out_of_time='' cancelled='' interrupted=''
trap 'out_of_time=1; interrupted=1; scancel --signal=TERM "$SLURM_JOB_ID" || true' USR1
trap 'cancelled=1; interrupted=1' TERM

srun --label --kill-on-bad-exit=0 bash -c "$(declare -f node); node" &
child=$!
{WAIT_FOR_CHILD}
# 0 done, 2 configuration, 3 checkpoint or data, 4 numeric, 6 storage: starting again would end the same. 75: saved.
# Anything else is a lost node or rank, tried again {plan.max_restarts} times beyond the restarts inside the job.
again=''
case $code in
    0 | 2 | 3 | 4 | 6) ;;
    75) again=$out_of_time ;;
    *) if (( ${{SLURM_RESTART_COUNT:-0}} < {plan.max_restarts} )); then again=1; fi ;;
esac
if [[ $again && ! $cancelled ]]; then
    echo "exit code $code: back into the queue, to go on from the newest checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def _indent(text: str) -> str:
    return text.replace("\n", "\n    ")


def limit_seconds(text: str) -> float:
    """A time limit as sbatch takes it: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S or UNLIMITED. Raises ConfigError."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    days, has_days, rest = text.rpartition("-")
    parts = rest.split(":")
    if len(parts) > 3 or not all(part.isascii() and part.isdigit() for part in [*parts, *([days] if has_days else [])]):
        raise ConfigError(f"--time: '{text}' is no time limit of Slurm; write for instance 24:00:00 or 2-00:00:00")
    units = (3600, 60, 1) if has_days or len(parts) == 3 else (60, 1)
    clock = sum(int(part) * unit for part, unit in zip(parts, units, strict=False))
    return int(days or 0) * 86400 + clock
