"""What a checkpoint must share with whatever reads it: the run that goes on from it, an export, an evaluation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.loader import to_dict
from configs.schema import RunConfig
from configs.typed import flat
from trainer.data.order import ORDER
from trainer.differences import differences
from trainer.errors import CheckpointError

# Everything else (learning rate, hooks, how the batch is cut, cadence, the mixture of the data ahead) may change
# between two starts of a run; the change is logged.
_IDENTITY = (
    "model.",
    "seed",
    "train.global_batch_size",
    "train.sequence_length",
    "engine.precision",
)
_FREE = ("model.activation_recompute", "model.compile", "model.dropout", "model.loss_tile")


def identity(config: RunConfig, fingerprint: str) -> dict[str, Any]:
    """The settings by full key that a checkpoint is bound to; `fingerprint`: of the corpus."""
    fixed = {
        key: value for key, value in flat(to_dict(config)).items() if key.startswith(_IDENTITY) and key not in _FREE
    }
    return fixed | {
        "data.fingerprint": fingerprint,
        "data.packing": config.data.packing,
        "data.order": ORDER,
    }


def refuse_other_settings(folder: Path, manifest: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises CheckpointError if the checkpoint in `folder` was written under another identity than `now`, which a run
    folder's config.yaml and corpus gave: its weights would be taken for those of another model."""
    changes = differences(manifest["identity"], now)
    if changes:
        raise CheckpointError(
            f"{folder}: was not trained with the config.yaml and corpus of its run folder ({'; '.join(changes)}); "
            "restore those settings"
        )
