"""What `launch.data` looks at: the stream of a run folder, with the phases it went through, or of a configuration."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from configs.loader import load_run_config
from configs.schema import RunConfig
from launch._corpus import open_corpus
from trainer.checkpoint_files import read_train_state
from trainer.data.corpus import TokenCorpus
from trainer.errors import ConfigError


class Stream(NamedTuple):
    """A corpus whose plan is the run's."""

    name: str
    config: RunConfig
    corpus: TokenCorpus
    run_dir: Path | None
    """None for a configuration."""
    trained: int
    """Samples trained as of the newest checkpoint; 0 for a configuration."""

    @property
    def planned(self) -> int:
        """Samples of the whole run."""
        return self.config.train.steps * self.config.train.global_batch_size


def open_stream(target: str, overrides: Sequence[str]) -> Stream:
    """`target`: run folder or YAML file.

    Raises ConfigError or CheckpointError for what keeps the run itself from its data.
    """
    path = Path(target)
    run_dir = path if path.is_dir() else None
    if run_dir is not None and overrides:
        raise ConfigError(f"{overrides[0]}: a run folder has its own configuration; overrides go with a YAML file")
    # The stream is the same for any number of ranks.
    config = load_run_config(path if run_dir is None else run_dir / "config.yaml", overrides, world_size=None)
    corpus = open_corpus(config)
    state = None if run_dir is None else read_train_state(run_dir)
    if state is not None and state.plan:
        corpus.open_plan(state.plan, state.samples)
    name = config.name if run_dir is None else run_dir.resolve().name
    return Stream(name, config, corpus, run_dir, 0 if state is None else state.samples)
