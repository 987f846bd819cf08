"""The tables of `launch.dryrun --predict` and `--published`."""

import math
from argparse import ArgumentParser, Namespace
from dataclasses import fields
from typing import Any, get_args

from rich.table import Table

from configs.schema import RunConfig
from launch._hardware import GPUS, NETWORKS
from launch._layouts import Choice, Cluster, elasticities, ranked, weigh
from launch._published import PUBLISHED, Published, foretell, left_out
from launch._step_terms import Constants, Parts, Software
from trainer.errors import ConfigError

SHOWN = 5
WITHIN = 0.25
"""Largest relative error that is promised for the published figures of the first block."""


DEFAULTS = {
    "nodes": 1, "gpus_per_node": 8, "gpu": "h100", "network": "ib400", "max_vio": 0.1, "software": "eager"
}  # fmt: skip


def add_options(parser: ArgumentParser) -> None:
    """What describes the machines to foretell for; absent ones are None, so that one without --predict is noticed."""

    def add(name: str, text: str, **how: Any) -> None:
        default = DEFAULTS[name.replace("-", "_")]
        parser.add_argument(f"--{name}", help=f"with --predict: {text} (default {default})", **how)

    add("nodes", "machines", type=int)
    add("gpus-per-node", "GPUs of each machine", type=int)
    add("gpu", "their kind", choices=GPUS)
    add("network", "between machines, a port for each GPU", choices=NETWORKS)
    add("max-vio", "imbalance of experts to expect", type=float)
    add("software", "how fused the kernels between products are", choices=get_args(Software))


def refuse_options(arguments: Namespace) -> None:
    """ConfigError for an option that would have no effect without --predict."""
    for name in DEFAULTS:
        if getattr(arguments, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: is read with --predict only; add that or leave it out")


def foretold_ranks(arguments: Namespace) -> int:
    """Ranks of all machines; fills in defaults. ConfigError if the machines make no sense."""
    for name, default in DEFAULTS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    for name in ("nodes", "gpus_per_node"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: {getattr(arguments, name)} must be at least 1")
    if not 0 <= arguments.max_vio < math.inf:
        raise ConfigError(f"--max-vio: {arguments.max_vio} must be finite and not negative; 0 is perfect balance")
    ranks = int(arguments.nodes * arguments.gpus_per_node)
    if arguments.world_size not in (None, ranks):
        raise ConfigError(
            f"--world-size: {arguments.world_size} is not --nodes x --gpus-per-node = {ranks}; leave it out"
        )
    return ranks


def cluster_of(arguments: Namespace, *, needs_whole_step: bool) -> Cluster:
    """The machines that the command line names."""
    return Cluster(
        gpu=GPUS[arguments.gpu],
        network=NETWORKS[arguments.network],
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        max_violation=arguments.max_vio,
        software=arguments.software,
        needs_whole_step=needs_whole_step,
    )


def _refuse_unknown(config: RunConfig) -> None:
    """ConfigError for a layout whose cost nothing here knows."""
    if config.engine.sequence_parallel_size > 1:
        raise ConfigError("engine.sequence_parallel_size: is not foretold; set it to 1 with --predict")
    if config.engine.offload_optimizer:
        raise ConfigError("engine.offload_optimizer: is not foretold; set it to false with --predict")


def foretell_layouts(config: RunConfig, vocab_size: int, cluster: Cluster) -> tuple[RunConfig, list[Table], str]:
    """The step as configured, the fastest layouts that fit, and the assumptions that matter most, as tables.

    Before them the configuration they begin with, after them why that is another layout than the configured one: it
    does not fit so many ranks, and the fastest is taken. Empty if it does.

    Raises ConfigError if no layout fits so many ranks, or if nothing is known of such a step.
    """
    _refuse_unknown(config)
    if config.engine.precision != "bf16":
        raise ConfigError("engine.precision: steps are foretold in bf16 only; set engine.precision=bf16")
    constants = Constants()
    problems = config.problems(cluster.gpus)
    choices = ranked(config, vocab_size, cluster, constants)
    if problems and not choices:
        raise ConfigError(*_what_to_change(config, cluster.gpus, problems))
    configured = None if problems else weigh(config, vocab_size, cluster, constants)
    fastest = next((choice for choice in choices if choice.fits), None)
    first = configured or choices[0]
    tables = [_parts(first, cluster, is_configured=not problems), _layouts(configured, choices, cluster)]
    if fastest is not None:
        tables.append(_assumptions(fastest, vocab_size, cluster, constants))
    which = "the fastest layout that fits" if fastest else "the smallest layout"
    misfit = f"as configured it does not run on {cluster.gpus} ranks: {'; '.join(problems)}. What follows is {which}."
    return first.config, tables, misfit if problems else ""


def _what_to_change(config: RunConfig, gpus: int, problems: list[str]) -> list[str]:
    """The problems of a configuration that no layout cures; one line if it is the batch that cannot be dealt."""
    size = config.train.global_batch_size
    if size % gpus == 0:
        return problems
    return [
        f"train.global_batch_size: {size} is not divisible by {gpus} ranks, in no layout; for instance "
        f"{-(-size // gpus) * gpus} is, or take other --nodes"
    ]


def _parts(choice: Choice, cluster: Cluster, *, is_configured: bool) -> Table:
    prediction, seconds = choice.prediction, choice.prediction.seconds
    title = (
        f"one step on {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}, {cluster.network.name} (foretold)"
    )
    table = Table(title=title)
    table.add_column("part, as configured" if is_configured else "part, first layout below")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for part in fields(Parts):
        value = getattr(prediction.parts, part.name)
        if value:
            table.add_row(part.name, f"{value:.3f}", f"{value / seconds:.0%}")
    table.add_section()
    table.add_row("all", f"{seconds:.3f}", "")
    table.add_row("tokens/s on each GPU", f"{prediction.tokens_per_gpu:,.0f}", "")
    table.add_row("model TFLOP/s of each GPU", f"{prediction.flops_per_gpu / 1e12:,.0f}", f"MFU {prediction.mfu:.1%}")
    run = seconds * choice.config.train.steps / 3600
    table.add_row("hours of the run", f"{run:,.1f}", f"{run * cluster.gpus:,.0f} GPU hours")
    table.caption = (
        f"software {choice.layout.software}, MaxVio {cluster.max_violation:g}; not in it: data, evaluation, "
        "checkpoints, hooks, engine.zero_options"
    )
    return table


def _layouts(configured: Choice | None, choices: list[Choice], cluster: Cluster) -> Table:
    fitting = [choice for choice in choices if choice.fits]
    table = Table(title=f"layouts of the same training that fit {cluster.gpu.memory_bytes / 1e9:.0f} GB, fastest first")
    for name in ("ZeRO", "experts over", "micro-batch", "recompute", "graphs kept", "GB", "seconds", "MFU"):
        table.add_column(name, justify="left" if name == "recompute" else "right")
    shown = fitting[:SHOWN] or choices[:1]
    for choice in [*shown, *([] if configured is None else [configured])]:
        if choice is configured:
            table.add_section()
        table.add_row(
            str(choice.layout.zero_stage), str(choice.layout.expert), str(choice.layout.micro_batch),
            choice.layout.recompute, f"{choice.kept_graphs} of {choice.layout.micro_batches}",
            f"{choice.memory_bytes / 1e9:.1f}" + ("" if choice.fits else " !"), f"{choice.prediction.seconds:.3f}",
            f"{choice.prediction.mfu:.1%}",
        )  # fmt: skip
    lines = []
    if configured is not None:
        lines.append("last row: as configured" + ("" if configured.fits else ", which does not fit (!)"))
    if fitting:
        lines.append(f"recommended: {fitting[0].overrides}")
    else:
        lines.append("NOTHING FITS: the smallest layout is shown; take more GPUs, larger ones or a smaller model")
    table.caption = "\n".join(lines)
    return table


def _assumptions(choice: Choice, vocab_size: int, cluster: Cluster, constants: Constants) -> Table:
    table = Table(title="what the fastest layout's step time hangs on")
    table.add_column("assumption")
    table.add_column("a fifth less", justify="right")
    table.add_column("a fifth more", justify="right")
    for name, (less, more) in list(elasticities(choice, vocab_size, cluster, constants).items())[:SHOWN]:
        table.add_row(name, f"{less:+.1%}", f"{more:+.1%}")
    return table


def published() -> Table:
    """What others measured beside what is foretold for their settings, errors and all."""
    constants = Constants()
    table = Table(title="model TFLOP/s of a GPU: published, foretold, and foretold without the row's help")
    for name in ("stack", "setting", "published", "foretold", "error", "left out", "error"):
        table.add_column(name, justify="left" if name in ("stack", "setting") else "right")
    for required in (True, False):
        for row in PUBLISHED:
            if row.required == required:
                table.add_row(row.group, row.name, f"{row.tflops:.0f}", *_against(row, constants))
        table.add_section()
    table.caption = "first block: promised within 25 %; second: never fitted, shown for honesty. ! beyond 25 %"
    return table


def _against(row: Published, constants: Constants) -> list[str]:
    found, without = foretell(row, constants), left_out(row, constants)
    error = found / row.tflops - 1
    cells = [f"{found:.0f}", f"{error:+.0%}" + (" !" if abs(error) > WITHIN else "")]
    return cells + (["", ""] if without is None else [f"{without:.0f}", f"{without / row.tflops - 1:+.0%}"])
