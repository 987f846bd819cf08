"""What a run would take, without a GPU: `python -m launch.dryrun configs/deepseekmoe-1b.yaml --world-size 64`.

Checks the configuration for that number of ranks and prints parameters, bytes a rank by component for each ZeRO
stage, and the arithmetic of the batch. Nothing is built; exit code 2 with every problem if the layout is refused.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from configs.hooks import build_hooks
from configs.loader import load_run_config
from configs.schema import RunConfig
from launch._cli import run_command
from moe.arithmetic import activation_bytes, count_parameters, flops_per_token
from trainer.data.prepare import read_manifest
from trainer.engine import EngineConfig
from trainer.errors import ConfigError


def main(argv: list[str]) -> int:
    """Print the arithmetic of a run; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.dryrun", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file, for instance configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance engine.zero_stage=2")
    parser.add_argument("--world-size", type=int, default=1, help="ranks, over all nodes (default 1)")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.world_size < 1:
        raise ConfigError(f"--world-size: {arguments.world_size} must be at least 1")
    config = load_run_config(arguments.config, arguments.overrides, world_size=arguments.world_size)
    manifest = read_manifest(Path(config.data.path))
    vocab_size = manifest["tokenizer"]["vocab_size"] if manifest else config.data.vocab_size

    console = Console()
    console.print(_parameters(config, vocab_size))
    console.print(_memory(config, vocab_size, arguments.world_size))
    console.print(_batch(config, vocab_size, arguments.world_size))
    return 0


def model_state_bytes(engine: EngineConfig, num_dense: int, num_routed: int, world_size: int) -> dict[str, float]:
    """Bytes of model state on one rank by component (Rajbhandari et al. 2020, arXiv 1910.02054, section 3).

    Stage 1 shards optimizer state and master weights over ranks, stage 2 gradients too, stage 3 parameters too (those
    of the layer at work are whole; they are not counted here). Routed experts are first divided by expert parallelism,
    then their state over the ranks that hold the same share. Buckets and the alignment of shards are not counted.
    """
    low = 2 if engine.precision == "bf16" else 4
    accumulate = 2 if engine.accumulation_dtype == "bf16" else 4
    # DeepSpeed's ZeRO keeps a flat float32 copy of its shard even when the model itself is float32.
    has_master = engine.precision == "bf16" or engine.zero_stage > 0
    local = num_dense + num_routed / engine.expert_parallel_size
    # A share of the experts lies on world / P ranks and its state is cut among those: 1 / world of all experts.
    sharded = local if engine.zero_stage == 0 else (num_dense + num_routed) / world_size
    return {
        "parameters": low * (sharded if engine.zero_stage == 3 else local),
        "gradients": accumulate * (sharded if engine.zero_stage >= 2 else local),
        "master weights": 4 * sharded if has_master else 0.0,
        "Adam moments": 8 * sharded,
    }


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
    table.caption = "\n".join(["* as configured", *offloaded, *refused])
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
    needs_whole_step = build_hooks(config.hooks).needs_batch_losses or config.model.aux_loss.global_batch > 0
    return config.train.mode(needs_whole_step=needs_whole_step, keeps_graphs=config.engine.keeps_graphs)


def _cell(state: dict[str, float] | str, component: str) -> str:
    return "" if isinstance(state, str) else _gib(state[component])


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.3f}"


if __name__ == "__main__":
    sys.exit(run_command(main))
