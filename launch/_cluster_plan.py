"""What every way of starting jobs on several nodes shares: the layout, and the launcher's command line.

Shell text is put together here and in the files beside, always from words that are quoted one by one.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.schema import RunConfig
from trainer.errors import ConfigError

# Whatever ends an agent, `wait` must not be left for a signal that the trap has handled: the flag says to wait again.
# Bash gives a child's status as often as it is asked for.
WAIT_FOR_CHILD = """\
while true; do
    interrupted=
    code=0
    wait "$child" || code=$?
    [[ $interrupted ]] || break
done
"""

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW", re.IGNORECASE)
_SAFE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class Agents:
    """The launchers of a job, one on each node."""

    nodes: int
    ranks_per_node: int
    max_restarts: int
    """How often the ranks are started again when one fails, before the job ends."""
    join_timeout_s: int
    """How long the other nodes wait for one that is gone."""
    grace_s: int
    """Seconds a run gets to save when it is asked to stop."""
    python: str

    def command(self, train: str, *, run_id: str, endpoint: str, is_host: str, local_addr: str) -> str:
        """Bash for one node's agent and its ranks, over several lines. Arguments are shell words, already quoted.

        `train`: arguments of launch.train. `endpoint`: host of the first node, and a port there. `is_host`: true on
        that node, false elsewhere; left to itself torchrun guesses from host names, and is wrong where a node has
        several. `local_addr`: how the others reach this node.
        """
        words = [
            f"{shlex.quote(self.python)} -m launch.torchrun",
            f"--nnodes={self.nodes} --nproc-per-node={self.ranks_per_node}",
            f"--rdzv-backend=c10d --rdzv-id={run_id} --rdzv-endpoint={endpoint}",
            f"--rdzv-conf=is_host={is_host},join_timeout={self.join_timeout_s}",
            f"--local-addr={local_addr}",
            f"--max-restarts={self.max_restarts} --shutdown-timeout={self.grace_s}",
            f"-m launch.train {train}",
        ]
        return " \\\n    ".join(words)

    def environment(self) -> dict[str, str]:
        """Variables of every rank."""
        found = {"PYTHONUNBUFFERED": "1"}
        if "/" in self.python:  # its ninja and torchrun go with it
            found["PATH"] = f"{Path(self.python).parent}:$PATH"
        return found


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run on several nodes."""

    config: RunConfig
    train_words: tuple[str, ...]
    """Arguments of launch.train: the file and the overrides."""
    agents: Agents
    has_gpus: bool
    port: int
    """Of the rendezvous, on the first node."""
    workdir: str
    env: Mapping[str, str]

    def problems(self) -> list[str]:
        """What cannot be launched, one line each."""
        found = []
        for option, value in (("--join-timeout", self.agents.join_timeout_s), ("--grace", self.agents.grace_s)):
            if value < 1:
                found.append(f"{option}: {value} must be at least 1 second")
        if self.agents.max_restarts < 0:
            found.append(f"--max-restarts: {self.agents.max_restarts} is negative; use 0 to end at the first failure")
        if not 1024 <= self.port <= 65535:
            found.append(f"--port: {self.port} is not a port that a user may open; use 1024 to 65535")
        for name in self.env:
            if not _SAFE_NAME.fullmatch(name):
                found.append(f"--env: '{name}' is not the name of a variable")
            elif _SECRET.search(name):
                found.append(
                    f"--env: {name} looks like a secret, which does not belong in a file; take it from the environment "
                    "that submits the job (Slurm), a Secret (--wandb-secret) or ~/.netrc"
                )
        return found

    def environment(self, interface: str = "") -> dict[str, str]:
        """Variables of every rank; the user's win."""
        found = self.agents.environment()
        if self.has_gpus:
            found["NCCL_DEBUG"] = "WARN"
        if interface:
            found["GLOO_SOCKET_IFNAME"] = interface
            if self.has_gpus:
                found["NCCL_SOCKET_IFNAME"] = interface
        return found | dict(self.env)

    def agent(self, *, run_id: str, endpoint: str, is_host: str, local_addr: str) -> str:
        """As `Agents.command`; `endpoint` is the host of the first node alone."""
        return self.agents.command(
            shlex.join(self.train_words), run_id=run_id, endpoint=f"{endpoint}:{self.port}", is_host=is_host,
            local_addr=local_addr,
        )  # fmt: skip


def exports(environment: Mapping[str, str]) -> str:
    """Bash that sets the environment."""
    lines = []
    for name, value in environment.items():
        quoted = f"{shlex.quote(value.removesuffix(':$PATH'))}:$PATH" if name == "PATH" else shlex.quote(value)
        lines.append(f"export {name}={quoted}\n")
    return "".join(lines)


def job_name(name: str, longest: int) -> str:
    """The run's name as a label that Kubernetes and DNS accept: lower case, digits and hyphens."""
    found = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not found or not found[0].isalpha() or len(found) > longest:
        raise ConfigError(
            f"name: '{name}' gives the job name '{found}', which must begin with a letter and have at most {longest} "
            "characters; set another with name=..."
        )
    return found


def one_word(option: str, value: str) -> str:
    """`value`, for a line that no shell reads but Slurm, with quotes of its own. Raises ConfigError for those."""
    if not re.fullmatch(r"[^\s\"'#\\]+", value) or value.startswith("-"):
        raise ConfigError(f"{option}: '{value}' must be one word here, without quotes, # and backslashes")
    return value


def parse_env(items: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` of the command line. Raises ConfigError."""
    for item in items:
        if "=" not in item:
            raise ConfigError(f"--env: '{item}' is not of the form NAME=VALUE")
    return dict(item.split("=", 1) for item in items)
