"""Weights that a run begins with: a folder of `launch.from_hf`, or a checkpoint of another run (`init_from`).

They are read once, before the first step. From the first checkpoint on the run folder alone says how to go on.
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from configs.loader import to_dict
from configs.schema import RunConfig
from configs.typed import flat
from launch._bias_kind import bias_multiplies, refuse_mixture, saved_bias_multiplies
from launch._tensors import WEIGHTS, TensorFolder, read_manifest, verify_weights
from moe.model import MoEDecoder
from trainer import ranks
from trainer.checkpoint_files import published
from trainer.data.corpus import TokenCorpus
from trainer.data.prepare import TOKENIZER
from trainer.errors import ConfigError

log = logging.getLogger("evenkeel")

_NEW_BLOCK = "next_token."  # multi-token prediction may be added to weights that have none
_CHANGES_NO_FUNCTION = (
    "model.activation_recompute",
    "model.compile",
    "model.loss_tile",
    "model.dropout",
    "model.init_std",
    "model.mtp_weight",
    "model.aux_loss",
)


def is_fresh(run_dir: Path) -> bool:
    """Whether a run folder has no checkpoint, so that a run in it starts from initial weights. All ranks agree."""
    return bool(ranks.broadcast_object(not published(run_dir / "checkpoints")))


def check_initial_weights(config: RunConfig, corpus: TokenCorpus) -> None:
    """Compare shapes and tokenizer with the run, from headers alone: cheap, and before any process group.

    Raises ConfigError that names what does not fit, CheckpointError if the folder is unreadable.
    """
    folder = Path(config.init_from)
    if not folder.is_dir():
        raise ConfigError(f"init_from: {folder} is no folder; name one that launch.from_hf wrote, or a checkpoint")
    manifest, source = read_manifest(folder), _open(folder)
    if saved_bias_multiplies(folder):
        refuse_mixture(folder, bias_multiplies(config), "or name other weights in init_from")
    expected = manifest.get("tokenizer_sha256")
    if expected is not None and expected != tokenizer_digest(
        Tokenizer.from_file(str(Path(config.data.path) / TOKENIZER))
    ):
        raise ConfigError(
            f"init_from: the corpus in {config.data.path} was prepared with another tokenizer than the weights; "
            f"prepare it in another data.path with data.tokenizer={folder / TOKENIZER}"
        )
    with torch.device("meta"):
        model = MoEDecoder(config.model, vocab_size=corpus.vocab_size)
    own = model_tensors(model)
    rows = source.shape("embedding.weight")[0] if "embedding.weight" in source.names else corpus.vocab_size
    if rows != corpus.vocab_size:
        raise ConfigError(
            f"init_from: {folder} has a vocabulary of {rows:,}, the corpus in {config.data.path} one of "
            f"{corpus.vocab_size:,}; prepare it with the tokenizer of the weights"
        )
    for name in sorted(own.keys() | source.names):
        if name not in source.names and name.startswith(_NEW_BLOCK):
            continue
        has = source.shape(name) if name in source.names else "absent"
        wants = tuple(own[name].shape) if name in own else "absent"
        if has != wants:
            raise ConfigError(
                f"init_from: {name} is {has} in {folder} and {wants} in the model; take over the model section of the "
                "config.yaml that belongs to the weights"
            )


@torch.no_grad()
def load_initial_weights(model: MoEDecoder, config: RunConfig, *, share: int = 0, num_shares: int = 1) -> None:
    """Verify the folder's hashes and copy its weights into a model on every rank; of sharded experts, one share.

    Raises CheckpointError if a file differs from its hash.
    """
    folder = Path(config.init_from)
    manifest = read_manifest(folder)
    verify_weights(folder, manifest)
    source = _open(folder)
    if saved_bias_multiplies(folder):
        for layer in model.moe_layers():
            layer.router.prepare_balancing(multiplicative=True, collect_thresholds=False)
    for name, tensor in model_tensors(model).items():
        if name in source.names:
            is_share = num_shares > 1 and not getattr(tensor, "allreduce", True)
            part = slice(share * len(tensor), (share + 1) * len(tensor)) if is_share else None
            tensor.copy_(source.read(name, part))
    if ranks.is_main():
        new = [name for name in model_tensors(model) if name not in source.names]
        log.info(
            "initial weights from %s%s", folder, f"; {len(new)} tensors of {_NEW_BLOCK[:-1]} are new" if new else ""
        )
        for line in _changed_settings(config, manifest):
            log.warning("init_from: the weights were made with another setting: %s", line)


def model_tensors(model: MoEDecoder) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once: what weight files hold."""
    kept = model.state_dict().keys()
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in named.items() if name in kept}


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """A hash of what a tokenizer does, whatever file it came from."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def model_settings(config: RunConfig) -> dict[str, Any]:
    """The model section as flat keys, as manifests keep it."""
    return {key: value for key, value in flat(to_dict(config)).items() if key.startswith("model.")}


def _changed_settings(config: RunConfig, manifest: Mapping[str, Any]) -> list[str]:
    before, now = manifest["identity"], model_settings(config)
    return [
        f"{key}: {before[key]} -> {now[key]}"
        for key in sorted(before.keys() & now.keys())
        if before[key] != now[key] and not key.startswith(_CHANGES_NO_FUNCTION)
    ]


def _open(folder: Path) -> TensorFolder:
    # A checkpoint holds other safetensors too: only the model's are meant.
    single = folder / WEIGHTS
    return TensorFolder(single if single.is_file() else folder)
