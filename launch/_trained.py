"""The model of a run, as its newest intact checkpoint has it."""

from pathlib import Path

import torch

from configs.loader import load_run_config
from configs.schema import RunConfig
from launch._bias_kind import saved_bias_multiplies
from launch._corpus import open_corpus
from launch._identity import identity, refuse_other_settings
from launch._tensors import WEIGHTS, read_manifest
from moe.model import MoEDecoder
from trainer.checkpoint_files import newest_intact
from trainer.data.corpus import TokenCorpus
from trainer.errors import CheckpointError
from trainer.model_weights import load_weights


def load_trained_model(run_dir: Path, device: torch.device) -> tuple[RunConfig, TokenCorpus, MoEDecoder, Path]:
    """Configuration, corpus, model with the checkpoint's weights, and the checkpoint's folder.

    Raises CheckpointError if the run has no intact checkpoint, or if that is not of this configuration and corpus.
    """
    config = load_run_config(run_dir / "config.yaml", world_size=None)
    corpus = open_corpus(config)
    folder = newest_intact(run_dir / "checkpoints")
    if folder is None:
        raise CheckpointError(f"{run_dir}: has no checkpoint yet; train it first")
    refuse_other_settings(folder, read_manifest(folder), identity(config, corpus.fingerprint))
    model = MoEDecoder(config.model, vocab_size=corpus.vocab_size)
    if config.engine.precision == "bf16":
        model.bfloat16()
    if saved_bias_multiplies(folder):
        for layer in model.moe_layers():
            layer.router.prepare_balancing(multiplicative=True, collect_thresholds=False)
    load_weights(model.to(device), folder / WEIGHTS)
    return config, corpus, model, folder
