"""Trains what it is told to in one process group: argv[1] is a folder with orders, 1.json, 2.json and so on.

An order is a list of [config file, overrides], trained one after the other; rank 0 then writes `<number>.done`. The order
`null` ends the job. argv[2], if given, names a change to make before (tests/dist/seams.py).
"""

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from configs.loader import load_run_config
from launch._corpus import open_corpus
from launch._run_folder import RunFolder
from launch.train import train
from trainer import ranks
from trainer.loop import StopSignal
from trainer.process_group import leave, start_process_group, stop_process_group


def read_order(path: Path) -> Any:
    """The order, once it is there; None if whoever gives orders is gone."""
    while not path.exists():
        try:
            os.kill(int(os.environ["ORDERED_BY"]), 0)
        except ProcessLookupError:
            return None
        time.sleep(0.02)
    return json.loads(path.read_text())


if __name__ == "__main__":
    if len(sys.argv) > 2:
        from tests.dist.seams import SEAMS

        SEAMS[sys.argv[2]]()
    gc.freeze()
    start_process_group(60)
    orders, number = Path(sys.argv[1]), 1
    while (order := read_order(orders / f"{number}.json")) is not None:
        for path, overrides in order:
            config = load_run_config(path, overrides, world_size=ranks.world_size())
            corpus = open_corpus(config)
            with RunFolder(Path(config.folder)):
                train(config, corpus, Path(config.folder), StopSignal())
            gc.collect()  # engines are cycles
            gc.freeze()  # what is left stays; a training looks at what it makes itself
        ranks.barrier()
        if ranks.is_main():
            (orders / f"{number}.done").touch()
        number += 1
    stop_process_group()
    leave(0)
