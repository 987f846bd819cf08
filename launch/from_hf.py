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
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer
from torch import Tensor

from configs.loader import to_dict
from configs.schema import RunConfig
from launch._cli import run_command
from launch._initial_weights import model_settings, model_tensors, tokenizer_digest
from launch._new_folder import new_folder
from launch._tensors import MANIFEST, ShardWriter, TensorFolder, file_entry, parse_size
from launch._upcycling import Upcycling, add_upcycling_options, plan_upcycling, upcycle, upcycled_config
from moe.config import ModelConfig
from moe.hf_config import Imported, from_hf
from moe.hf_layout import Place, layout
from moe.model import MoEDecoder
from trainer.checkpoint import FORMAT
from trainer.data.prepare import TOKENIZER
from trainer.errors import CheckpointError, ConfigError

_VOCABULARY = ("embedding.weight", "head.weight")

# Keys of config.json by what they hold; numbers that are calculated with before the model's own checks see them.
_WHOLE = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "num_experts_per_tok", "moe_intermediate_size", "n_routed_experts", "num_experts", "num_local_experts",
    "n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "decoder_sparse_step",
    "num_nextn_predict_layers", "num_mtp_layers",
)  # fmt: skip
_NUMBERS = ("rms_norm_eps", "rope_theta", "initializer_range", "routed_scaling_factor", "partial_rotary_factor")
_ROPE = ("rope_scaling", "rope_parameters")


def main(argv: list[str]) -> int:
    """Convert a folder; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.from_hf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="Hugging Face folder with config.json and safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist, or be empty")
    parser.add_argument("--shard-size", default="5GB", help="largest weight file, such as 500MB (default 5GB)")
    add_upcycling_options(parser)
    arguments = parser.parse_intermixed_args(argv)

    shard_bytes = parse_size(arguments.shard_size)
    described = _read_config(arguments.folder)
    imported = from_hf(described)
    plan = plan_upcycling(arguments, imported.model)
    model = imported.model if plan is None else upcycled_config(imported.model, plan)
    problems = model.problems()
    if problems:
        raise ConfigError(*(f"model.{line}" for line in problems))
    source = TensorFolder(arguments.folder)
    tokenizer, vocab_size, notes = _vocabulary(arguments.folder, imported.vocab_size)
    if imported.mtp_layers:
        notes.append("the layers of multi-token prediction are left out; model.mtp_weight starts a new one")
    notes += [f"model.{line}" for line in model.training_problems()]

    with new_folder(arguments.out) as staging:
        with ShardWriter(staging, shard_bytes) as writer:
            _write_weights(imported, plan, source, vocab_size, writer)
        _check_shapes(TensorFolder(staging), model, vocab_size)
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
    tables = [described, *(table for name in _ROPE if isinstance(table := described.get(name), dict))]
    problems = [line for table in tables for line in _wrong_kinds(table)]
    if problems:
        raise ConfigError(*(f"{path}: {line}" for line in problems))
    return described


def _wrong_kinds(table: Mapping[str, Any]) -> Iterator[str]:
    """Values of a kind that no library writes under their keys, one line each; null is as if the key were not there."""
    for kinds, name, keys in (
        ((int,), "a whole number", _WHOLE),
        ((int, float), "a number", _NUMBERS),
        ((dict,), "a table", _ROPE),
        ((list,), "a list", ("mlp_only_layers",)),
    ):
        for key in keys:
            value = table.get(key)
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                yield f"{key}: {value!r} is not {name}"


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
        mlp, _, matrix = place.ours.partition(".mlp.")
        if plan is not None and matrix and int(mlp.removeprefix("blocks.")) >= plan.dense_layers:
            for name, made in upcycle(f"{mlp}.mlp", matrix, tensor, plan, generator):
                writer.add(name, made)
        else:
            writer.add(place.ours, tensor)
    if plan is None and not imported.has_bias:
        for i, experts in enumerate(imported.model.block_experts):
            if experts:
                writer.add(f"blocks.{i}.mlp.router.expert_bias_E", torch.zeros(experts))
    _refuse_leftovers(source, used, imported)


def _join(place: Place, source: TensorFolder, used: set[str]) -> Tensor:
    used.update(name for part in place.parts for name in part.theirs)
    read = [[source.read(name) for name in part.theirs] for part in place.parts]
    try:
        parts = [part.join(tensors) for part, tensors in zip(place.parts, read, strict=True)]
        tensor = torch.stack(parts) if place.stacked else parts[0]
    except RuntimeError:
        raise CheckpointError(f"{place.parts[0].theirs[0]}: does not have the shape that config.json says") from None
    return tensor.float() if place.ours.endswith("expert_bias_E") else tensor


def _check_shapes(written: TensorFolder, model: ModelConfig, vocab_size: int) -> None:
    """Raises CheckpointError if the weights are not those of the model that config.json describes."""
    with torch.device("meta"):
        expected = model_tensors(MoEDecoder(model, vocab_size=vocab_size))
    assert expected.keys() == written.names
    for name, tensor in expected.items():
        if written.shape(name) != tuple(tensor.shape):
            raise CheckpointError(
                f"{name}: has shape {written.shape(name)}, config.json makes it {tuple(tensor.shape)}; the two do "
                "not belong together"
            )


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
