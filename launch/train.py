"""Pretrain a model: `torchrun --nproc_per_node=2 -m launch.train configs/quickstart.yaml [key=value ...]`.

Starting again with the same run folder resumes from its newest intact checkpoint. On several nodes start the same
command on each with torchrun's rendezvous options; the run folder must be on storage that all nodes share.
Without torchrun it trains in one process. Exit codes: 0 done, 2 config, 3 checkpoint or data, 4 numeric, 5 peer
lost, 6 storage, 75 preempted and saved (`python -m launch.torchrun` passes them on; plain torchrun ends with 1).
"""

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs.hooks import build_hooks
from configs.loader import load_run_config, to_dict, to_yaml
from configs.schema import RunConfig
from launch._cli import run_command
from moe.arithmetic import flops_per_token
from moe.model import MoEDecoder
from trainer import ranks
from trainer.checkpoint import CheckpointStore, TrainState
from trainer.data.corpus import TokenCorpus
from trainer.data.loader import TrainLoader
from trainer.errors import PREEMPTED_EXIT_CODE, StorageError
from trainer.hooks import RunContext, StopReason
from trainer.loop import StopSignal, Trainer
from trainer.metrics import JsonlLog, read_jsonl
from trainer.optim import build_adamw
from trainer.process_group import start_process_group, stop_process_group
from trainer.progress import Progress
from trainer.run_summary import summarize
from trainer.schedule import learning_rate
from trainer.telemetry import StepTelemetry
from trainer.wandb_sink import WandbSink

log = logging.getLogger("evenkeel")

# What a checkpoint must share with the run that loads it. Anything else (learning rate, hooks, cadence, batch cut)
# may change between two starts of a run: such a change is logged with its old and new value.
_IDENTITY_SECTIONS = ("model", "train.global_batch_size", "train.sequence_length", "engine.zero_stage", "engine.precision")
_IDENTITY_EXEMPT = ("model.activation_recompute",)


def main(argv: list[str]) -> int:
    """Train; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file, for instance configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance optimizer.peak_lr=3e-4")
    arguments = parser.parse_args(argv)

    config = load_run_config(arguments.config, arguments.overrides, world_size=ranks.world_size())
    corpus = TokenCorpus.open(config.data, sequence_length=config.train.sequence_length, seed=config.seed)
    start_process_group(config.engine.collective_timeout_s)
    reason = train(config, corpus)
    stop_process_group()
    return PREEMPTED_EXIT_CODE if reason == "preempted" else 0


def train(config: RunConfig, corpus: TokenCorpus) -> StopReason:
    """Build every part of the run, restore its newest checkpoint if there is one, and train."""
    run_dir = Path(config.folder)
    _open_run_folder(run_dir, config)
    device = ranks.device()

    torch.manual_seed(config.seed)  # the same initial weights on every rank
    model = MoEDecoder(config.model, vocab_size=corpus.vocab_size)
    optimizer = build_adamw(model, config.optimizer)
    hooks = build_hooks(config.hooks)
    run = RunContext(
        model=model,
        total_steps=config.train.steps,
        global_batch_size=config.train.global_batch_size,
        domain_names=corpus.domain_names,
        run_dir=run_dir,
        device=device,
        seed=config.seed,
    )
    engine = Engine_for(config, model, optimizer)
    hooks.on_start(run)
    torch.manual_seed(config.seed + 1 + ranks.rank())  # from here on: dropout, different on every rank

    store = CheckpointStore(run_dir, config.checkpoint, _identity(config, corpus))
    state = store.load_newest(engine, hooks) or TrainState()
    if state.step and ranks.is_main():
        log.info("resumed from step %d of %s", state.step, run_dir)
    metrics_file = run_dir / "metrics.jsonl"
    report = _Report(config, run_dir, JsonlLog(metrics_file), state.step)
    trainer = Trainer(
        config=config.train,
        engine=engine,
        hooks=hooks,
        run=run,
        corpus=corpus,
        loader=TrainLoader(
            corpus,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            rank=ranks.rank(),
            world_size=ranks.world_size(),
            num_workers=config.data.num_workers,
            pin_memory=device.type == "cuda",
        ),
        learning_rate=partial(learning_rate, config.schedule, peak=config.optimizer.learning_rate, total_steps=config.train.steps),
        evaluation=config.evaluation,
        checkpoint=config.checkpoint,
        store=store,
        telemetry=StepTelemetry(
            state,
            corpus.domain_names,
            flops_per_token=flops_per_token(config.model, corpus.vocab_size, config.train.sequence_length),
            device=device,
        ),
        write=report.write,
        state=state,
        stop=StopSignal(),
    )
    try:
        reason = trainer.train()
    finally:
        report.close()
    if ranks.is_main():
        sys.stdout.write(f"{reason}: results are in {run_dir}\n")
    return reason
