"""Write a run as a Hugging Face folder: `python -m launch.export runs/quickstart --out exported`.

The folder holds safetensors, config.json, generation_config.json, the tokenizer and a model card;
`transformers.AutoModelForCausalLM.from_pretrained` and everything that builds on it loads it. The architecture follows
from the configuration: multi-head latent attention becomes DeepSeek-V3, a softmax router Qwen3-MoE, any other
GLM-4-MoE. What an architecture cannot express is refused with the configuration key, before anything is written.

The checkpoint's hashes are verified first. Weights are read and written tensor by tensor: memory holds one shard.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from configs.loader import load_run_config
from configs.schema import RunConfig
from launch._bias_kind import saved_bias_multiplies
from launch._cli import run_command
from launch._identity import identity, refuse_other_settings
from launch._model_card import model_card
from launch._new_folder import new_folder
from launch._tensors import WEIGHTS, ShardWriter, TensorFolder, parse_size, read_manifest, verify_weights
from moe.hf_config import CLASSES, Architecture, choose_architecture, export_problems, has_selection_bias, to_hf
from moe.hf_layout import layout
from trainer.checkpoint_files import newest_intact, published, step_of
from trainer.data.prepare import TOKENIZER
from trainer.data.prepare import read_manifest as read_corpus_manifest
from trainer.errors import CheckpointError, ConfigError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(argv: list[str]) -> int:
    """Export a run; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist, or be empty")
    parser.add_argument("--step", type=int, help="checkpoint to export (default: the newest intact one)")
    parser.add_argument("--dtype", choices=[*_DTYPES], help="type of the weights (default: as in the checkpoint)")
    parser.add_argument("--architecture", choices=[*CLASSES], help="default: what the configuration says")
    parser.add_argument("--shard-size", default="5GB", help="largest weight file, such as 500MB (default 5GB)")
    arguments = parser.parse_intermixed_args(argv)

    shard_bytes = parse_size(arguments.shard_size)
    config = load_run_config(arguments.run / "config.yaml", world_size=None)
    architecture = arguments.architecture or choose_architecture(config.model)
    problems = export_problems(config.model, architecture)
    if problems:
        raise ConfigError(*problems)
    folder = _checkpoint(arguments.run, arguments.step)
    manifest = read_manifest(folder)
    verify_weights(folder, manifest)
    corpus = _corpus(config, manifest["identity"])
    refuse_other_settings(folder, manifest, identity(config, corpus["fingerprint"]))
    tokenizer = Tokenizer.from_file(str(Path(config.data.path) / TOKENIZER))
    end = int(corpus["tokenizer"]["end_of_document"])
    source = TensorFolder(folder / WEIGHTS)
    _refuse_lost_bias(source, architecture, multiplied=saved_bias_multiplies(folder))

    dtype = _DTYPES[arguments.dtype] if arguments.dtype else source.read("final_norm.weight").dtype
    with new_folder(arguments.out) as staging:
        with ShardWriter(staging, shard_bytes) as writer:
            _write_weights(config, architecture, source, dtype, writer)
        vocab_size = source.shape("embedding.weight")[0]
        described = to_hf(
            config.model,
            architecture,
            vocab_size=vocab_size,
            max_positions=config.train.sequence_length,
            end=end,
            dtype=str(dtype).removeprefix("torch."),
        )
        _write_json(staging / "config.json", described)
        _write_json(staging / "generation_config.json", {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end})
        _write_tokenizer(staging, tokenizer, end, config.train.sequence_length)
        card = model_card(
            arguments.run,
            config,
            manifest,
            vocab_size=vocab_size,
            architecture=CLASSES[architecture],
            dtype=described["dtype"],
        )
        (staging / "README.md").write_text(card)
    sys.stdout.write(f"{folder} -> {arguments.out}: {CLASSES[architecture]}, {described['dtype']}\n")
    if config.model.has_mtp:
        sys.stdout.write("model.mtp_weight: the multi-token-prediction block only trains and is left out\n")
    return 0


def _checkpoint(run: Path, step: int | None) -> Path:
    if step is None:
        newest = newest_intact(run / "checkpoints")
        if newest is None:
            raise CheckpointError(f"{run}: has no checkpoint yet; train it first")
        return newest
    folder = run / "checkpoints" / f"step-{step:08d}"
    if not folder.is_dir():
        kept = [step_of(path) for path in published(run / "checkpoints")]
        raise CheckpointError(f"--step: {run} has no checkpoint of step {step}, only of {kept}")
    return folder


def _corpus(config: RunConfig, expected: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of the run's corpus, which brings the tokenizer."""
    folder = Path(config.data.path)
    corpus = read_corpus_manifest(folder)
    if corpus is None:
        raise ConfigError(
            f"data.path: {folder} holds no prepared corpus, so no tokenizer; bring it back, or prepare it again"
        )
    if corpus["fingerprint"] != expected.get("data.fingerprint"):
        raise CheckpointError(
            f"data.path: the corpus in {folder} is not the one this run was trained on, its tokenizer may be another; "
            "bring the old one back"
        )
    return corpus


def _refuse_lost_bias(source: TensorFolder, architecture: Architecture, *, multiplied: bool) -> None:
    """Raises ConfigError if the biases take part in the selection and the architecture has no place for them."""
    names = sorted(name for name in source.names if name.startswith("blocks.") and name.endswith("expert_bias_E"))
    biased = {name: bias_E for name in names if (bias_E := source.read(name)).min() < bias_E.max()}
    if biased and multiplied:
        raise ConfigError(
            "hooks.expert_bias.rule: multiplicative multiplies the scores; no architecture does, they add the bias"
        )
    if biased and not has_selection_bias(architecture):
        name, bias_E = max(biased.items(), key=lambda item: float(item[1].abs().max()))
        raise ConfigError(
            f"hooks.expert_bias: {CLASSES[architecture]} selects without a bias, this run with one (in "
            f"{name.removesuffix('.mlp.router.expert_bias_E')} up to {bias_E.abs().max():.3g}); without it other "
            "experts would be chosen. model.router_score sigmoid has an architecture with a bias"
        )


def _write_weights(
    config: RunConfig, architecture: Architecture, source: TensorFolder, dtype: torch.dtype, writer: ShardWriter
) -> None:
    for place in layout(config.model, has_bias=has_selection_bias(architecture)):
        for index, part in enumerate(place.parts):
            tensor = source.read(place.ours, index if place.stacked else None)
            tensor = _additive(tensor) if place.ours.endswith("expert_bias_E") else tensor.to(dtype)
            for name, piece in zip(part.theirs, part.split(tensor), strict=True):
                writer.add(name, piece)
    model = config.model
    for i, experts in enumerate(model.block_experts[: model.num_layers]):
        prefix = f"model.layers.{i}."
        if architecture == "qwen3_moe" and model.attention_bias:
            # Its switch for biases has one on the output projection too; ours has none there.
            writer.add(f"{prefix}self_attn.o_proj.bias", torch.zeros(model.hidden_size, dtype=dtype))
        if architecture != "qwen3_moe" and experts and not model.num_shared_experts:
            # It always has shared experts; ours are of width 0.
            for name, shape in (("gate", (0, -1)), ("up", (0, -1)), ("down", (-1, 0))):
                width = [model.hidden_size if size else 0 for size in shape]
                writer.add(f"{prefix}mlp.shared_experts.{name}_proj.weight", torch.zeros(width, dtype=dtype))


def _additive(bias_E: Tensor) -> Tensor:
    """A bias that is the same for all experts chooses nothing, whether it is added or multiplied: then zero."""
    return torch.zeros_like(bias_E) if bias_E.min() == bias_E.max() else bias_E.float()


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, end: int, max_length: int) -> None:
    tokenizer.save(str(folder / TOKENIZER))
    token = tokenizer.id_to_token(end)
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token,
        "eos_token": token,
        "pad_token": token,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", described)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
