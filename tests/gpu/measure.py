"""Train a config briefly in bf16 and print tokens/s, MFU and host syncs a step: `-m tests.gpu.measure CONFIG`."""

import statistics
import sys
from pathlib import Path

import torch

from configs.loader import load_run_config
from launch._corpus import open_corpus
from launch._run_folder import RunFolder
from launch.train import train
from tests.gpu.host_syncs import HostSyncs
from tests.harness import rows
from trainer import ranks
from trainer.loop import StopSignal
from trainer.process_group import start_process_group, stop_process_group

STEPS = 60
WARMUP = 10

if __name__ == "__main__":
    overrides = [
        "name=gpu-check", f"train.steps={STEPS}", "engine.precision=bf16", "train.micro_batch_size=16",
        "evaluation.every=0", "checkpoint.every=0", "wandb.mode=disabled", "train.write_every=10",
    ]  # fmt: skip
    config = load_run_config(sys.argv[1], overrides, world_size=ranks.world_size())
    corpus = open_corpus(config)
    start_process_group(60)
    with HostSyncs() as syncs, RunFolder(Path(config.folder)):
        train(config, corpus, Path(config.folder), StopSignal())
    training = [row for row in rows(Path(config.folder)) if "loss" in row][WARMUP:]

    def median(key: str) -> str:
        values = [float(row[key]) for row in training if row.get(key) is not None]  # type: ignore[arg-type]
        return f"{statistics.median(values):.4g}" if values else "unknown"

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    sys.stdout.write(
        f"{device}: {median('tokens_per_s')} tokens/s, MFU {median('mfu')}, {syncs.count / STEPS:.1f} host syncs a "
        f"step (start, end and evaluation included), loss {training[0]['loss']:.3f} -> {training[-1]['loss']:.3f}\n"
    )
    stop_process_group()
