"""Run folders with random weights, as training leaves them, without the training."""

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch

from configs.loader import load_run_config, to_yaml
from configs.schema import RunConfig
from launch._identity import identity
from launch._tensors import file_entry
from moe.model import MoEDecoder
from tests.harness import tiny_config
from trainer.data.config import DataConfig
from trainer.data.prepare import read_manifest
from trainer.model_weights import whole_weights

STEP = 12
ARCHITECTURES: dict[str, dict[str, object]] = {
    "glm4_moe": {
        "qk_norm": True, "attention_bias": True, "partial_rotary": 0.5, "num_groups": 4, "top_groups": 2,
        "routed_scale": 2.5, "num_shared_experts": 2,
    },
    "qwen3_moe": {
        "router_score": "softmax", "qk_norm": True, "num_shared_experts": 0, "num_dense_layers": 0,
        "layer_experts": [8, 0, 8], "head_dim": 16, "rope_theta": 1e6,
    },
    "deepseek_v3": {
        "attention": "mla", "num_kv_heads": 4, "norm_eps": 1e-5,
        "mla": {
            "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
        },
    },
}  # fmt: skip


def random_weights(model: MoEDecoder, *, biased: bool) -> None:
    """Weights large enough that every part of the model shows in the logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in whole_tensors(model).items():
            if name.endswith("expert_bias_E"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3 * biased)
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.15 + (tensor.ndim == 1))


def whole_tensors(model: MoEDecoder) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def write_run(
    folder: Path, data: DataConfig, *, biased: bool = True, dtype: torch.dtype = torch.float32, **sections: object
) -> tuple[Path, RunConfig, MoEDecoder]:
    """A run folder with one checkpoint; the model in it."""
    config = load_run_config(tiny_config(folder, data, **sections), world_size=None)
    manifest = read_manifest(Path(data.path))
    assert manifest is not None
    model = MoEDecoder(config.model, vocab_size=manifest["tokenizer"]["vocab_size"]).eval()
    random_weights(model, biased=biased)
    run = folder / "run"
    checkpoint = run / "checkpoints" / f"step-{STEP:08d}"
    checkpoint.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    (run / "metrics.jsonl").write_text(json.dumps({"step": STEP, "tokens": 3072, "loss": 3.0}) + "\n")
    write_weights(
        checkpoint, model.to(dtype), identity(config, manifest["fingerprint"]), rule=config.hooks["expert_bias"]["rule"]
    )
    return run, config, model


def write_weights(checkpoint: Path, model: MoEDecoder, of: Mapping[str, object], *, rule: str = "sign") -> None:
    safetensors.torch.save_file(whole_weights(model), checkpoint / "model.safetensors")
    hooks = {"expert_bias": {"version": 1, "values": {"updates": STEP, "rule": rule}}}
    (checkpoint / "state.json").write_text(json.dumps({"trainer": {}, "hooks": hooks}))
    files = {name: file_entry(checkpoint / name) for name in ("model.safetensors", "state.json")}
    described = {"format": 1, "step": STEP, "identity": of, "files": files}
    (checkpoint / "MANIFEST.json").write_text(json.dumps(described))
