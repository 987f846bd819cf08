"""What a run would take, without a GPU: `python -m launch.dryrun configs/deepseekmoe-1b.yaml --world-size 64`.

Checks the configuration for that number of ranks and prints parameters, bytes a rank by component for each ZeRO
stage, what is chosen for DeepSpeed and why, and the arithmetic of the batch. Nothing is built; exit code 2 with every
problem if the layout is refused.

With --predict also what a step would take on GPUs (launch/PREDICTION.md): its parts, the layouts that fit and the
fastest of them, and which assumption matters most. Where the layout as configured does not fit that many ranks, a line
says why and the tables are of the fastest layout that does:

    python -m launch.dryrun configs/16b-a3b.yaml --predict --nodes 16 --gpu h100 --network ib400

--published prints how far the formula is from what others measured.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from rich.table import Table

from configs.hooks import build_hooks
from configs.loader import load_run_config
from configs.schema import RunConfig
from launch._cli import run_command
from launch._console import terminal
from launch._foretell import add_options, cluster_of, foretell_layouts, foretold_ranks, published, refuse_options
from launch._states import model_state_bytes
from moe.arithmetic import activation_bytes, count_parameters, flops_per_token
from trainer.data.prepare import read_manifest
from trainer.engine_choices import choices
from trainer.errors import ConfigError


def main(argv: list[str]) -> int:
    """Print the arithmetic of a run; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.dryrun", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="YAML file, for instance configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance engine.zero_stage=2")
    parser.add_argument("--world-size", type=int, help="ranks, over all nodes (default 1, or those of --nodes)")
    parser.add_argument("--predict", action="store_true", help="foretell step time, memory and MFU on GPUs")
    add_options(parser)
    parser.add_argument("--published", action="store_true", help="only compare the formula with published figures")
    arguments = parser.parse_intermixed_args(argv)
    console = terminal()
    if arguments.published:
        if arguments.config is not None or arguments.predict:
            raise ConfigError("--published: stands alone; leave out the configuration and --predict")
        refuse_options(arguments)
        console.print(published())
        return 0
    if arguments.config is None:
        parser.error("the following arguments are required: config")
    world_size = _world_size(arguments)
    # What is foretold may be another layout than the configured one, which need not fit so many ranks.
    checked_for = None if arguments.predict else world_size
    config = load_run_config(arguments.config, arguments.overrides, world_size=checked_for)
    manifest = read_manifest(Path(config.data.path))
    vocab_size = manifest["tokenizer"]["vocab_size"] if manifest else config.data.vocab_size
    shown: list[Table] = []
    if arguments.predict:
        cluster = cluster_of(arguments, needs_whole_step=_needs_whole_step(config))
        config, shown, misfit = foretell_layouts(config, vocab_size, cluster)
        if misfit:
            console.print(misfit, highlight=False, soft_wrap=True)
    console.print(_parameters(config, vocab_size))
    console.print(_memory(config, vocab_size, world_size))
    console.print(_engine(config, vocab_size, world_size))
    console.print(_batch(config, vocab_size, world_size))
    for table in shown:
        console.print(table)
    return 0


def _world_size(arguments: argparse.Namespace) -> int:
    """Ranks that the command line asks for."""
    if arguments.predict:
        return foretold_ranks(arguments)
    refuse_options(arguments)
    chosen = 1 if arguments.world_size is None else int(arguments.world_size)
    if chosen < 1:
        raise ConfigError(f"--world-size: {chosen} must be at least 1")
    return chosen


def _parameters(config: RunConfig, vocab_size: int) -> Table:
    count = count_parameters(config.model, vocab_size)
    table = Table(title=f"parameters (vocabulary {vocab_size:,})")
    table.add_column("component")
    table.add_column("total", justify="right")
    table.add_column("active", justify="right")
    for name, total in count.total.items():
        table.add_row(name, f"{total:,}", f"{count.active[name]:,}")
    table.add_section()
    table.add_row("all", f"{count.num_total:,}", f"{count.num_active:,}")
    return table


def _memory(config: RunConfig, vocab_size: int, world_size: int) -> Table:
    count = count_parameters(config.model, vocab_size)
    routed = count.total["routed experts"]
    table = Table(title=f"GiB on each of {world_size} ranks (estimate)")
    table.add_column("component")
    stages: dict[str, dict[str, float] | str] = {}
    for stage in range(4):
        engine = dataclasses.replace(config.engine, zero_stage=stage)
        problems = engine.problems()
        stages[f"ZeRO {stage}"] = (
            problems[0] if problems else model_state_bytes(engine, count.num_total - routed, routed, world_size)
        )
    for name in stages:
        table.add_column(name + (" *" if name.endswith(str(config.engine.zero_stage)) else ""), justify="right")
    graphs = config.train.global_batch_size // (config.train.micro_batch_size * config.engine.data_parallel(world_size))
    kept = graphs if _mode(config) == "deferred" else 1
    activations = activation_bytes(
        config.model,
        vocab_size,
        tokens=config.train.micro_batch_size * config.train.sequence_length // config.engine.sequence_parallel_size,
        element_bytes=2 if config.engine.precision == "bf16" else 4,
        kept_graphs=kept,
    )
    for component in ("parameters", "gradients", "master weights", "Adam moments"):
        table.add_row(component, *(_cell(state, component) for state in stages.values()))
    table.add_row(
        f"activations ({kept} kept)", *("" if isinstance(s, str) else _gib(activations) for s in stages.values())
    )
    table.add_section()
    table.add_row(
        "all", *("refused" if isinstance(s, str) else _gib(sum(s.values()) + activations) for s in stages.values())
    )
    refused = [f"{name}: {state}" for name, state in stages.items() if isinstance(state, str)]
    offloaded = ["master weights and Adam moments lie in the host's memory"] * config.engine.offload_optimizer
    table.caption = "\n".join(["* this layout", *offloaded, *refused])
    return table


def _engine(config: RunConfig, vocab_size: int, world_size: int) -> Table:
    count = count_parameters(config.model, vocab_size)
    routed = count.total["routed experts"]
    local = count.num_total - routed + routed // config.engine.expert_parallel_size
    table = Table(title=f"engine (DeepSpeed, ZeRO {config.engine.zero_stage})")
    table.add_column("choice")
    table.add_column("value", justify="right")
    table.add_column("because")
    for choice in choices(config.engine, local, world_size):
        table.add_row(*choice)
    return table


def _batch(config: RunConfig, vocab_size: int, world_size: int) -> Table:
    train = config.train
    tokens = train.global_batch_size * train.sequence_length
    flops = flops_per_token(config.model, vocab_size, train.sequence_length) * tokens
    table = Table(title="batch")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    shared, dealt = config.engine.sequence_parallel_size, config.engine.data_parallel(world_size)
    accumulation = train.global_batch_size // (train.micro_batch_size * dealt)
    ranks = f"{dealt} ranks" if shared == 1 else f"{dealt} groups of {shared} ranks"
    layout = f"{train.micro_batch_size} x {ranks} x {accumulation} micro-batches"
    table.add_row("samples a step", f"{train.global_batch_size:,} = {layout}")
    table.add_row("accumulation", _mode(config))
    table.add_row("tokens a step", f"{tokens:,}")
    table.add_row("tokens in the run", f"{tokens * train.steps:,}")
    table.add_row("model FLOPs a step", f"{flops:.3g}")
    table.add_row("model FLOPs of the run", f"{flops * train.steps:.3g}")
    return table


def _mode(config: RunConfig) -> str:
    return config.train.mode(needs_whole_step=_needs_whole_step(config), keeps_graphs=config.engine.keeps_graphs)


def _needs_whole_step(config: RunConfig) -> bool:
    return bool(build_hooks(config.hooks).needs_batch_losses or config.model.aux_loss.global_batch > 0)


def _cell(state: dict[str, float] | str, component: str) -> str:
    return "" if isinstance(state, str) else _gib(state[component])


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.3f}"


if __name__ == "__main__":
    sys.exit(run_command(main))
