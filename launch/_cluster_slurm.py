"""Batch scripts for Slurm: one agent on each node, warned ahead of the time limit, requeued when it has saved."""

import math
import shlex
from dataclasses import dataclass

from launch._cluster_plan import WAIT_FOR_CHILD, Agents, Plan, exports, job_name, one_word
from trainer.errors import ConfigError

HEAD_NODE = '"$head_node"'
"""Of the script that `job` writes."""
ON_NODE = {
    "run_id": '"$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"',
    "is_host": '"$is_host"',
    "local_addr": '"$SLURMD_NODENAME"',
}
"""Shell words for an agent's command in that script."""


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
    """The script of one run. Raises ConfigError for a time limit or an option that sbatch would not understand."""
    agents = plan.agents
    if limit_seconds(options.time) <= agents.grace_s:
        raise ConfigError(
            f"--grace: {agents.grace_s} s ahead of a time limit of {options.time} leaves no time to train; lower it"
        )
    directives = [
        f"job-name={job_name(plan.config.name, 60)}",
        f"nodes={agents.nodes}",
        *([f"gpus-per-node={agents.ranks_per_node}"] if plan.has_gpus else []),
        f"time={options.time}",
        *common_directives(agents),
        "output=%x-%j.log",
        *(one_word("--sbatch", each.removeprefix("--")) for each in options.directives),
    ]
    agent = plan.agent(endpoint=HEAD_NODE, **ON_NODE)
    return f"""\
#!/bin/bash
# {agents.nodes} nodes, {agents.ranks_per_node} ranks on each. Written by launch.cluster slurm; start with sbatch.
{"".join(f"#SBATCH --{each}{chr(10)}" for each in directives)}
set -euo pipefail
cd {shlex.quote(plan.workdir)}
{"".join(f"{line}{chr(10)}" for line in options.setup)}{exports(plan.environment(options.interface))}
{job(agents, agent)}"""


def common_directives(agents: Agents) -> list[str]:
    """What `job` relies on."""
    return ["ntasks-per-node=1", f"signal=B:USR1@{agents.grace_s}", "requeue", "open-mode=append"]


def job(agents: Agents, agent: str) -> str:
    """Bash that runs `agent` on each node of the job, warns it of the time limit, and has the job requeued if that
    helps."""
    return f"""\
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export head_node=${{hosts[0]}}

# Runs once on each node.
node() {{
    is_host=false
    if [[ $SLURM_NODEID == 0 ]]; then is_host=true; fi
    exec {_indent(agent)}
}}

# {agents.grace_s} s before the time limit Slurm tells this shell, and this shell the agents (and not srun, which may
# end them at once). They save and end with exit code 75. A job that is cancelled gets SIGTERM and is not started again.
out_of_time='' cancelled='' interrupted=''
trap 'out_of_time=1; interrupted=1; scancel --signal=TERM "$SLURM_JOB_ID" || true' USR1
trap 'cancelled=1; interrupted=1' TERM

srun --label --kill-on-bad-exit=0 bash -c "$(declare -f node); node" &
child=$!
{WAIT_FOR_CHILD}
# 0 done, 2 configuration, 3 checkpoint or data, 4 numeric, 6 storage: starting again would end the same. 75: saved.
# Anything else is a lost node or rank, tried again {agents.max_restarts} times beyond the restarts inside the job.
again=''
case $code in
    0 | 2 | 3 | 4 | 6) ;;
    75) again=$out_of_time ;;
    *) if (( ${{SLURM_RESTART_COUNT:-0}} < {agents.max_restarts} )); then again=1; fi ;;
esac
if [[ $again && ! $cancelled ]]; then
    echo "exit code $code: back into the queue, to go on from the newest checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def _indent(text: str) -> str:
    return text.replace("\n", "\n    ")


def limit_seconds(text: str, option: str = "--time") -> float:
    """A time limit as sbatch takes it: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S or UNLIMITED. Raises ConfigError."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    days, has_days, rest = text.rpartition("-")
    parts = rest.split(":")
    if len(parts) > 3 or not all(part.isascii() and part.isdigit() for part in [*parts, *([days] if has_days else [])]):
        raise ConfigError(f"{option}: '{text}' is no time limit of Slurm; write for instance 24:00:00 or 2-00:00:00")
    units = (3600, 60, 1) if has_days or len(parts) == 3 else (60, 1)
    clock = sum(int(part) * unit for part, unit in zip(parts, units, strict=False))
    return int(days or 0) * 86400 + clock
