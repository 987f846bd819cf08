"""Prints Adam's clock in an engine just built, and the largest difference between its weights and the model's."""

import sys
from pathlib import Path

from configs.loader import load_run_config
from launch._corpus import open_corpus
from launch.train import build
from trainer.process_group import leave, start_process_group, stop_process_group

if __name__ == "__main__":
    config = load_run_config(sys.argv[1])
    start_process_group(60)
    engine, _, _ = build(config, open_corpus(config), Path(config.folder))
    parameters = dict(engine.module.named_parameters())
    worst = max(
        (fragment.weight - parameters[fragment.name].detach().flatten()[fragment.start : fragment.stop].float())
        .abs().max().item()
        for fragment in engine.state.fragments()
    )  # fmt: skip
    print(engine.state.clock, worst)
    stop_process_group()
    leave(0)
