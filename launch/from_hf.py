"""Start from a Hugging Face folder: `python -m launch.from_hf folder --out initial [--experts 8 --top-k 2]`.

A mixture of experts (GLM-4-MoE, Qwen3-MoE, DeepSeek-V3) is taken as it is, for continued pretraining. A dense model
(Qwen3, Qwen2, Llama, Mistral) becomes one by upcycling: with --experts each of its feed-forwards is copied into that
many experts (Komatsuzaki et al. 2023); with --granularity G it is first cut into G narrower pieces. Gates are
normalised, and with G pieces routed_scale is G, so that the new model is the same function as the dense one until
training parts the experts.

Writes weights with hashes, the tokenizer and config.yaml. Prepare text with it, then train:

    python -m launch.prepare initial/config.yaml data.source=my/texts
    torchrun --nproc_per_node=N -m launch.train initial/config.yaml data.source=my/texts train.steps=1000
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from tokenizers import Tokenizer
from torch import Tensor

from configs.loader import to_dict
from configs.schema import RunConfig
from launch._cli import run_command
from launch._initial_weights import model_settings, tokenizer_digest
from launch._new_folder import new_folder
from launch._tensors import MANIFEST, ShardWriter, TensorFolder, file_entry
from moe.config import ModelConfig
from moe.hf_config import Imported, from_hf
from moe.hf_layout import Place, layout
from moe.upcycling import upcycle_down, upcycle_gate_up, upcycle_problems, upcycle_router
from trainer.checkpoint import FORMAT
from trainer.data.prepare import TOKENIZER
from trainer.errors import CheckpointError, ConfigError

_SHARD_BYTES = 5 * 10**9
_VOCABULARY = ("embedding.weight", "head.weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upcycling:
    """How a dense model becomes a mixture of experts."""

    num_experts: int
    top_k: int
    granularity: int
    dense_layers: int
    router_score: Literal["sigmoid", "softmax"]
    router_std: float
    seed: int


def main(argv: list[str]) -> int:
    """Convert a folder; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.from_hf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="Hugging Face folder with config.json and safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist, or be empty")
    upcycling = parser.add_argument_group("upcycling of a dense model")
    upcycling.add_argument("--experts", type=int, help="experts a layer")
    upcycling.add_argument("--top-k", type=int, help="experts a token uses (default: 2 x granularity)")
    upcycling.add_argument("--granularity", type=int, help="pieces each feed-forward is cut into (default 1)")
    upcycling.add_argument("--dense-layers", type=int, help="first layers that stay dense (default 0)")
    upcycling.add_argument("--router", choices=["sigmoid", "softmax"], help="score function (default sigmoid)")
    upcycling.add_argument("--router-std", type=float, help="deviation of the new routers' weights (default 0.02)")
    upcycling.add_argument("--seed", type=int, help="seed of the new routers (default 0)")
    arguments = parser.parse_intermixed_args(argv)

    described = _read_config(arguments.folder)
    imported = from_hf(described)
    plan = _plan(arguments, imported)
    model = imported.model if plan is None else _upcycled(imported.model, plan)
    problems = model.problems()
    if problems:
        raise ConfigError(*(f"model.{line}" for line in problems))
    source = TensorFolder(arguments.folder)
    tokenizer, vocab_size, notes = _vocabulary(arguments.folder, imported.vocab_size)
    if imported.mtp_layers:
        notes.append("the layers of multi-token prediction are left out; model.mtp_weight starts a new one")

    with new_folder(arguments.out) as staging:
        with ShardWriter(staging, _SHARD_BYTES) as writer:
            _write_weights(imported, plan, source, vocab_size, writer)
        _write_manifest(staging, model, tokenizer, arguments.folder)
        (staging / "config.yaml").write_text(_config_yaml(model, arguments.out, tokenizer is not None))
    for line in notes:
        sys.stdout.write(f"{line}\n")
    sys.stdout.write(f"{arguments.folder} ({described['model_type']}) -> {arguments.out}: vocabulary {vocab_size:,}\n")
    return 0


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    try:
        described = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path} does not exist; give a Hugging Face folder") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error})") from None
    if not isinstance(described, dict):
        raise ConfigError(f"{path} must hold keys and values, not {type(described).__name__}")
    return described


def _plan(arguments: argparse.Namespace, imported: Imported) -> Upcycling | None:
    """How to upcycle, or None for a model that has experts already. Raises ConfigError for options that do not fit."""
    names = ("experts", "top_k", "granularity", "dense_layers", "router", "router_std", "seed")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    is_dense = not any(imported.model.block_experts)
    if not is_dense:
        if given:
            raise ConfigError(f"--{next(iter(given)).replace('_', '-')}: the model has experts already; leave it out")
        return None
    if "experts" not in given:
        raise ConfigError("--experts: the model is dense; say how many experts its feed-forwards become")
    granularity = given.get("granularity", 1)
    plan = Upcycling(
        num_experts=given["experts"],
        top_k=given.get("top_k", 2 * granularity),
        granularity=granularity,
        dense_layers=given.get("dense_layers", 0),
        router_score=given.get("router", "sigmoid"),
        router_std=given.get("router_std", 0.02),
        seed=given.get("seed", 0),
    )
    problems = upcycle_problems(
        width=imported.model.dense_intermediate_size,
        num_experts=plan.num_experts,
        top_k=plan.top_k,
        granularity=plan.granularity,
    )
    if not 0 <= plan.dense_layers < imported.model.num_layers:
        problems.append(f"--dense-layers: {plan.dense_layers} must be in [0, {imported.model.num_layers})")
    if not 0 < plan.router_std < float("inf"):
        problems.append(f"--router-std: {plan.router_std} must be finite and positive")
    if problems:
        raise ConfigError(*problems)
    return plan


def _upcycled(dense: ModelConfig, plan: Upcycling) -> ModelConfig:
    return dataclasses.replace(
        dense,
        num_dense_layers=plan.dense_layers,
        num_experts=plan.num_experts,
        top_k=plan.top_k,
        expert_intermediate_size=dense.dense_intermediate_size // plan.granularity,
        num_shared_experts=0,
        router_score=plan.router_score,
        normalize_gates=True,
        routed_scale=float(plan.granularity),
    )


def _vocabulary(folder: Path, rows: int) -> tuple[Tokenizer | None, int, list[str]]:
    """The tokenizer if there is one, the size of the vocabulary, and what was done about it."""
    path = folder / TOKENIZER
    if not path.is_file():
        note = f"{folder} has no {TOKENIZER}: data.tokenizer must be one with exactly {rows:,} tokens"
        return None, rows, [note]
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    known = tokenizer.get_vocab_size(with_added_tokens=True)
    if known > rows:
        raise ConfigError(f"{path}: has {known:,} tokens, the model's embedding only {rows:,} rows")
    if max(tokenizer.get_vocab(with_added_tokens=True).values()) >= known:
        raise ConfigError(f"{path}: its token ids have gaps; our corpora want ids 0 to {known - 1:,}")
    left = rows - known
    return tokenizer, known, [f"{left:,} rows of the embedding belong to no token and are left out"] if left else []


def _write_weights(
    imported: Imported, plan: Upcycling | None, source: TensorFolder, vocab_size: int, writer: ShardWriter
) -> None:
    generator = torch.Generator().manual_seed(plan.seed if plan else 0)
    used: set[str] = set()
    for place in layout(imported.model, has_bias=imported.has_bias, interleaved=imported.interleaved):
        tensor = _join(place, source, used)
        if place.ours in _VOCABULARY:
            tensor = tensor[:vocab_size]
        block, _, rest = place.ours.removeprefix("blocks.").partition(".")
        if plan is not None and rest.startswith("mlp.") and int(block) >= plan.dense_layers:
            _write_upcycled(f"blocks.{block}.mlp", rest, tensor, imported.model, plan, generator, writer)
        else:
            writer.add(place.ours, tensor)
    if plan is None and not imported.has_bias:
        for i, experts in enumerate(imported.model.block_experts):
            if experts:
                writer.add(f"blocks.{i}.mlp.router.expert_bias_E", torch.zeros(experts))
    _refuse_leftovers(source, used, imported)


def _join(place: Place, source: TensorFolder, used: set[str]) -> Tensor:
    parts = []
    for part in place.parts:
        used.update(part.theirs)
        parts.append(part.join([source.read(name) for name in part.theirs]))
    tensor = torch.stack(parts) if place.stacked else parts[0]
    return tensor.float() if place.ours.endswith("expert_bias_E") else tensor


def _write_upcycled(
    mlp: str,
    rest: str,
    tensor: Tensor,
    dense: ModelConfig,
    plan: Upcycling,
    generator: torch.Generator,
    writer: ShardWriter,
) -> None:
    sizes = {"num_experts": plan.num_experts, "granularity": plan.granularity}
    if rest == "mlp.down.weight":
        writer.add(f"{mlp}.experts.down", upcycle_down(tensor, **sizes))
        return
    writer.add(f"{mlp}.experts.gate_up", upcycle_gate_up(tensor, **sizes))
    router = upcycle_router(**sizes, hidden_size=dense.hidden_size, std=plan.router_std, generator=generator)
    writer.add(f"{mlp}.router.weight", router.to(tensor.dtype))
    writer.add(f"{mlp}.router.expert_bias_E", torch.zeros(plan.num_experts))


def _refuse_leftovers(source: TensorFolder, used: set[str], imported: Imported) -> None:
    """Raises CheckpointError for a tensor that takes part in the model and was not read."""
    layers = imported.model.num_layers
    mtp = tuple(f"model.layers.{layer}." for layer in range(layers, layers + imported.mtp_layers))
    for name in sorted(source.names - used):
        is_tied_head = name == "lm_head.weight" and imported.model.tie_embeddings
        is_constant = name.endswith("rotary_emb.inv_freq")
        is_zero_bias = name.endswith("o_proj.bias") and not source.read(name).any()
        is_empty = 0 in source.shape(name)
        if not (name.startswith(mtp) or is_tied_head or is_constant or is_zero_bias or is_empty):
            raise CheckpointError(f"{name}: our model has no place for this tensor; the folder cannot be used")


def _write_manifest(folder: Path, model: ModelConfig, tokenizer: Tokenizer | None, source: Path) -> None:
    if tokenizer is not None:
        tokenizer.save(str(folder / TOKENIZER))
    manifest = {
        "format": FORMAT,
        "source": source.name,
        "identity": model_settings(RunConfig(model=model)),
        "tokenizer_sha256": None if tokenizer is None else tokenizer_digest(tokenizer),
        "files": {path.name: file_entry(path) for path in sorted(folder.iterdir())},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def _config_yaml(model: ModelConfig, out: Path, has_tokenizer: bool) -> str:
    resolved, defaults = to_dict(RunConfig(model=model)), to_dict(RunConfig())
    tree = {
        "name": out.name,
        "init_from": str(out.resolve()),
        "model": {key: value for key, value in resolved["model"].items() if value != defaults["model"][key]},
        "data": {"path": f"data/{out.name}"}
        | ({"tokenizer": str((out / TOKENIZER).resolve())} if has_tokenizer else {}),
    }
    head = "# Written by launch.from_hf. Set data.source, and train, optimizer, schedule and engine as for any run.\n"
    return head + yaml.safe_dump(tree, sort_keys=False)


if __name__ == "__main__":
    sys.exit(run_command(main))
