"""Held-out loss of a run's newest checkpoint: `python -m launch.evaluate runs/quickstart [--max-rows 64]`.

With --record-scores FILE it also records what every router gave a sample of the held-out tokens, for `launch.theory
--scores FILE`; the format is described in moe/score_sample.py.

Works in one process or under torchrun with any number of ranks: it reads the checkpoint's plain weights.
"""

import argparse
from pathlib import Path

import torch
from rich.table import Table

from configs.loader import load_run_config
from launch._cli import run_command
from launch._console import terminal
from launch._trained import load_trained_model
from moe.balance_metrics import max_violation
from moe.score_sample import RecordedScores, ScoreSample, save_scores
from trainer import ranks
from trainer.data.config import MORE_HELDOUT
from trainer.errors import ConfigError
from trainer.evaluate import EvaluationConfig, evaluate
from trainer.process_group import leave, start_process_group, stop_process_group


def main(argv: list[str]) -> int:
    """Evaluate a run; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--max-rows", type=int, default=0, help="held-out rows of each domain; 0 (default) is all")
    parser.add_argument("--record-scores", type=Path, metavar="FILE", help="write router scores to FILE (safetensors)")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens to record scores of (default 8192)")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.tokens < 1:
        raise ConfigError(f"--tokens: {arguments.tokens} must be at least 1")
    if arguments.max_rows < 0:
        raise ConfigError(f"--max-rows: {arguments.max_rows} is negative; use 0 for all")

    timeout_s = load_run_config(arguments.run / "config.yaml", world_size=None).engine.collective_timeout_s
    start_process_group(timeout_s)
    config, corpus, model, folder = load_trained_model(arguments.run, ranks.device())
    if not corpus.has_heldout_text:
        raise ConfigError(
            f"{config.data.path}: no document is held out, so there is nothing to evaluate on; {MORE_HELDOUT}"
        )
    sample = None
    if arguments.record_scores:
        if not model.moe_layers():
            raise ConfigError(f"--record-scores: the model of {arguments.run} has no experts; leave it out")
        sample = ScoreSample(model, [layer.router for layer in model.moe_layers()], arguments.tokens)
    heldout = evaluate(
        model,
        corpus,
        EvaluationConfig(max_rows=arguments.max_rows),
        batch_size=config.train.micro_batch_size,
        device=ranks.device(),
    )
    violations = [max_violation(ranks.all_reduce_(counts_E)) for counts_E in model.take_counts("eval")]
    recorded = None if sample is None else sample.take()
    if ranks.is_main():
        if recorded is not None:
            layers = {i: scores_TE for i, scores_TE in enumerate(recorded) if scores_TE is not None}
            save_scores(arguments.record_scores, RecordedScores(layers, config.model.top_k, str(folder)))
        table = Table(title=f"{folder}, {heldout.tokens:,} held-out tokens")
        table.add_column("metric")
        table.add_column("value", justify="right")
        for name, value in heldout.metrics().items():
            table.add_row(name, f"{value:.4f}")
        if violations:
            mean = torch.stack(violations).nanmean()  # layers that only train have no loads here
            table.add_row("eval/maxvio_global", f"{mean:.4f}")
        terminal().print(table)
    stop_process_group()
    return 0


if __name__ == "__main__":
    leave(run_command(main))
