"""Held-out loss of a run's newest checkpoint: `python -m launch.evaluate runs/quickstart [--max-rows 64]`.

Works in one process or under torchrun with any number of ranks: it reads the checkpoint's plain weights.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from configs.loader import load_run_config
from launch._cli import run_command
from launch._corpus import open_corpus
from moe.balance_metrics import max_violation
from moe.model import MoEDecoder
from trainer import ranks
from trainer.checkpoint import WEIGHTS, load_weights, newest_intact
from trainer.errors import CheckpointError
from trainer.evaluate import EvaluationConfig, evaluate
from trainer.process_group import start_process_group, stop_process_group


def main(argv: list[str]) -> int:
    """Evaluate a run; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--max-rows", type=int, default=0, help="held-out rows of each domain; 0 (default) is all")
    arguments = parser.parse_intermixed_args(argv)

    config = load_run_config(arguments.run / "config.yaml", world_size=ranks.world_size())
    corpus = open_corpus(config)
    start_process_group(config.engine.collective_timeout_s)
    folder = newest_intact(arguments.run / "checkpoints")
    if folder is None:
        raise CheckpointError(f"{arguments.run}: has no checkpoint yet; train it first")
    model = MoEDecoder(config.model, vocab_size=corpus.vocab_size)
    if config.engine.precision == "bf16":
        model.bfloat16()
    model.to(ranks.device())
    load_weights(model, folder / WEIGHTS)
    heldout = evaluate(
        model,
        corpus,
        EvaluationConfig(max_rows=arguments.max_rows),
        batch_size=config.train.micro_batch_size,
        device=ranks.device(),
    )
    violations = [max_violation(ranks.all_reduce_(counts_E)) for counts_E in model.take_counts("eval")]
    if ranks.is_main():
        table = Table(title=f"{folder}, {heldout.tokens:,} held-out tokens")
        table.add_column("metric")
        table.add_column("value", justify="right")
        for name, value in heldout.metrics().items():
            table.add_row(name, f"{value:.4f}")
        if violations:
            table.add_row("eval/maxvio_global", f"{sum(map(float, violations)) / len(violations):.4f}")
        Console().print(table)
    stop_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
