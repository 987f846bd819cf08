"""Start a run on several nodes: `python -m launch.cluster slurm|k8s|ssh CONFIG [key=value ...] [options]`.

  slurm   write a batch script for sbatch
  k8s     write a manifest for kubectl: a PyTorchJob of Kubeflow's training operator
  ssh     print a command for each host of a DeepSpeed hostfile, or run them (--run)

All three start `python -m launch.torchrun` on each node with a c10d rendezvous on the first one, check the
configuration for nodes x ranks first (exit code 2 with every problem), and save and stop with exit code 75 when asked.
`python -m launch.cluster slurm --help` explains the options. launch/CLUSTER.md has the whole story.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.loader import load_run_config
from launch._cli import run_command
from launch._cluster_k8s import CONFIG_PATH, KubernetesOptions, manifest
from launch._cluster_plan import Agents, Plan, parse_env
from launch._cluster_slurm import SlurmOptions, batch_script
from launch._cluster_ssh import Host, commands, display, read_hostfile, run
from trainer.errors import ConfigError, StorageError

KINDS = ("slurm", "k8s", "ssh")


def main(argv: list[str]) -> int:
    """Write or run what starts a run on a cluster; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.cluster",
        usage="python -m launch.cluster {slurm,k8s,ssh} CONFIG [key=value ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=KINDS, help="what starts the job")
    kind = parser.parse_args(argv[:1]).kind
    arguments = _parser(kind).parse_intermixed_args(argv[1:])

    hosts = read_hostfile(Path(arguments.hostfile)) if kind == "ssh" else []
    plan = _plan(kind, arguments, hosts)
    if kind == "slurm":
        return _write(batch_script(plan, _slurm(arguments)), arguments.out)
    if kind == "k8s":
        return _write(manifest(plan, _kubernetes(arguments)), arguments.out)
    if arguments.run:
        return run(plan, hosts, arguments.interface)
    return _write(display(commands(plan, hosts, arguments.interface), hosts), arguments.out)


def _plan(kind: str, arguments: argparse.Namespace, hosts: Sequence[Host]) -> Plan:
    if hosts:
        nodes, ranks_per_node, has_gpus = len(hosts), hosts[0].slots, not arguments.cpu
    else:
        nodes, has_gpus = arguments.nodes, arguments.cpu_ranks_per_node is None
        ranks_per_node = arguments.gpus_per_node if has_gpus else arguments.cpu_ranks_per_node
    for option, value in (("--nodes", nodes), ("ranks of a node", ranks_per_node)):
        if value < 1:
            raise ConfigError(f"{option}: {value} must be at least 1")
    plan = Plan(
        config=load_run_config(arguments.config, arguments.overrides, world_size=nodes * ranks_per_node),
        train_words=(CONFIG_PATH,) if kind == "k8s" else (arguments.config, *arguments.overrides),
        agents=Agents(
            nodes=nodes,
            ranks_per_node=ranks_per_node,
            max_restarts=arguments.max_restarts,
            join_timeout_s=arguments.join_timeout,
            grace_s=arguments.grace,
            python=arguments.python,
        ),
        has_gpus=has_gpus,
        port=arguments.port,
        workdir=_workdir(kind, arguments),
        env=parse_env(arguments.env),
    )
    problems = plan.problems()
    if problems:
        raise ConfigError(*problems)
    return plan


def _slurm(arguments: argparse.Namespace) -> SlurmOptions:
    return SlurmOptions(
        time=arguments.time,
        interface=arguments.interface,
        setup=tuple(arguments.setup),
        directives=tuple(arguments.sbatch),
    )


def _kubernetes(arguments: argparse.Namespace) -> KubernetesOptions:
    return KubernetesOptions(
        image=arguments.image,
        namespace=arguments.namespace,
        volumes=_volumes(arguments.volume),
        wandb_secret=arguments.wandb_secret,
        interface=arguments.interface,
    )


def _parser(kind: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m launch.cluster {kind}", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("config", help="YAML file, for instance configs/deepseekmoe-1b.yaml")
    add("overrides", nargs="*", metavar="key=value", help="for instance optimizer.learning_rate=3e-4")
    if kind == "ssh":
        add(
            "--hostfile",
            required=True,
            metavar="FILE",
            help="lines of the form 'host slots=N', as DeepSpeed reads them",
        )
        add("--cpu", action="store_true", help="slots are ranks on CPUs, not GPUs")
        add("--run", action="store_true", help="run the commands, and show the output of all hosts")
    else:
        add("--nodes", type=int, required=True, metavar="N", help="how many nodes")
        ranks = parser.add_mutually_exclusive_group()
        ranks.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="GPUs of a node, a rank each")
        ranks.add_argument("--cpu-ranks-per-node", type=int, metavar="R", help="ranks of a node without GPUs")
    add("--out", default="-", metavar="FILE", help="where to write; - is standard output")
    add("--port", type=int, default=29500, help="of the rendezvous, on the first node")
    add("--max-restarts", type=int, default=3, metavar="N", help="how often ranks are started again when one fails")
    add("--join-timeout", type=int, default=600, metavar="S", help="seconds that nodes wait for one that is gone")
    add("--grace", type=int, default=300, metavar="S", help="seconds a run gets to save when it is asked to stop")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable for every rank (no secrets)")
    add("--interface", default="", metavar="IF", help="network interface of NCCL and gloo, for instance ib0")
    add("--python", default="python" if kind == "k8s" else sys.executable, help="the interpreter on the nodes")
    if kind == "slurm":
        add("--time", default="24:00:00", help="time limit of the job; it goes on in another one")
        add("--sbatch", action="append", default=[], metavar="OPTION=VALUE", help="for instance partition=gpu")
        add(
            "--setup",
            action="append",
            default=[],
            metavar="LINE",
            help="bash to run first, for instance 'module load x'",
        )
    if kind == "k8s":
        add("--image", required=True, help="container image with this package installed")
        add("--volume", action="append", default=[], metavar="CLAIM:/PATH", help="shared volume, for data and runs")
        add("--namespace", default="", help="of the job")
        add("--wandb-secret", default="", metavar="NAME", help="Secret whose entry WANDB_API_KEY is the key of W&B")
    else:
        add("--workdir", default=os.getcwd(), metavar="DIR", help="where the command runs, on every node")
    return parser


def _workdir(kind: str, arguments: argparse.Namespace) -> str:
    if kind != "k8s":
        return os.path.abspath(arguments.workdir)
    volumes = _volumes(arguments.volume)
    return volumes[0][1] if volumes else "/"


def _volumes(items: list[str]) -> tuple[tuple[str, str], ...]:
    found = []
    for item in items:
        claim, _, path = item.partition(":")
        if not claim or not path.startswith("/") or path == "/":
            raise ConfigError(f"--volume: '{item}' is not of the form CLAIM:/path")
        found.append((claim, path.rstrip("/")))
    return tuple(found)


def _write(text: str, out: str) -> int:
    if out == "-":
        sys.stdout.write(text)
        return 0
    try:
        Path(out).write_text(text)
    except OSError as error:
        raise StorageError(f"--out: {out}: {error.strerror}; name a file in a folder that exists") from error
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
