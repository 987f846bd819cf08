"""Trains several configurations in one process group: argv[1] is a JSON list of [config file, overrides].

argv[2], if given, names a change to make before (tests/dist/seams.py).
"""

import json
import sys
from pathlib import Path

from configs.loader import load_run_config
from launch._corpus import open_corpus
from launch._run_folder import RunFolder
from launch.train import train
from trainer import ranks
from trainer.loop import StopSignal
from trainer.process_group import start_process_group, stop_process_group

if __name__ == "__main__":
    if len(sys.argv) > 2:
        from tests.dist.seams import SEAMS

        SEAMS[sys.argv[2]]()
    start_process_group(60)
    for path, overrides in json.loads(sys.argv[1]):
        config = load_run_config(path, overrides, world_size=ranks.world_size())
        corpus = open_corpus(config)
        with RunFolder(Path(config.folder), config):
            train(config, corpus, Path(config.folder), StopSignal())
    stop_process_group()
