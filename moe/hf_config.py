"""Our ModelConfig as a Hugging Face config.json and back, and what neither can say of the other."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from moe.config import ModelConfig
from moe.latent import LatentConfig
from trainer.errors import ConfigError

Architecture = Literal["glm4_moe", "qwen3_moe", "deepseek_v3"]

CLASSES: dict[str, str] = {
    "glm4_moe": "Glm4MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
DENSE = ("llama", "mistral", "qwen2", "qwen3")
"""Dense decoders that can be read, for upcycling: SwiGLU, RMSNorm, rotary positions."""
_TITLES = {"glm4_moe": "GLM-4-MoE", "qwen3_moe": "Qwen3-MoE", "deepseek_v3": "DeepSeek-V3"}


class Imported(NamedTuple):
    """What a config.json says, in our words."""

    model: ModelConfig
    vocab_size: int
    has_bias: bool
    """Whether its router has a selection bias."""
    interleaved: bool
    """Whether its files interleave the rotated pairs of latent attention."""
    mtp_layers: int
    """Layers of multi-token prediction behind the model's own, which are left out."""


def has_selection_bias(architecture: str) -> bool:
    """Whether a router of the architecture adds a bias to the scores it selects by."""
    return architecture in ("glm4_moe", "deepseek_v3")


def choose_architecture(config: ModelConfig) -> Architecture:
    """The architecture closest to a configuration; `export_problems` says whether it fits."""
    if config.attention == "mla":
        return "deepseek_v3"
    return "qwen3_moe" if config.router_score == "softmax" else "glm4_moe"


def export_problems(config: ModelConfig, architecture: Architecture) -> list[str]:
    """What of the model the architecture cannot express, one line each, beginning with the config key."""
    title, blocks = _TITLES[architecture], config.block_experts[: config.num_layers]
    sparse = {experts for experts in blocks if experts}
    dense_first = sum(experts == 0 for experts in blocks)
    wanted: dict[str, tuple[Any, ...]] = {
        "attention": ("mla",) if architecture == "deepseek_v3" else ("gqa",),
        "capacity_factor": (0.0,),
        "uniform_routing": (False,),
    }
    if sparse:
        wanted["router_score"] = ("softmax",) if architecture == "qwen3_moe" else ("sigmoid",)
    if architecture == "qwen3_moe":
        wanted |= {"partial_rotary": (1.0,), "qk_norm": (True,)}
    if architecture == "qwen3_moe" and sparse:
        wanted |= {"num_shared_experts": (0,), "num_groups": (1,), "routed_scale": (1.0,)}
    found = []
    for name, allowed in wanted.items():
        value = getattr(config, name)
        if value not in allowed:
            found.append(f"model.{name}: {title} has no place for {value!r}, only for {allowed[0]!r}")
    if len(sparse) > 1:
        found.append(f"model.layer_experts: {title} has the same number of experts in every sparse layer, not {blocks}")
    elif architecture != "qwen3_moe" and any(blocks[:dense_first]):
        found.append(f"model.layer_experts: dense layers of {title} come first, not as in {blocks}")
    return found


def to_hf(
    config: ModelConfig, architecture: Architecture, *, vocab_size: int, max_positions: int, end: int, dtype: str
) -> dict[str, Any]:
    """The config.json of a model without export problems. `end`: id of the token that ends a document."""
    blocks = config.block_experts[: config.num_layers]
    dense = [i for i, experts in enumerate(blocks) if not experts]
    experts = max(blocks) or config.num_experts
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    common = {
        "architectures": [CLASSES[architecture]],
        "model_type": architecture,
        "dtype": dtype,
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.dense_intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "max_position_embeddings": max_positions,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "moe_intermediate_size": config.expert_intermediate_size,
        "num_experts_per_tok": config.top_k,
        "norm_topk_prob": config.normalize_gates,
        # A document begins where the one before it ended: the same token opens a text that has no beginning yet.
        "bos_token_id": end,
        "eos_token_id": end,
        "use_cache": True,
    }
    if architecture == "qwen3_moe":
        return common | {
            "head_dim": config.head_size,
            "num_experts": experts,
            "mlp_only_layers": dense,
            "decoder_sparse_step": 1,
            "router_aux_loss_coef": 0.0,
        }
    common |= {
        "n_routed_experts": experts,
        "n_shared_experts": config.num_shared_experts,
        "n_group": config.num_groups,
        "topk_group": config.top_groups,
        "routed_scaling_factor": config.routed_scale,
        "first_k_dense_replace": len(dense),
        "num_nextn_predict_layers": 0,
    }
    if architecture == "glm4_moe":
        share = _rotary_share(config)
        rope["partial_rotary_factor"] = share
        return common | {"head_dim": config.head_size, "use_qk_norm": config.qk_norm, "partial_rotary_factor": share}
    widths = dataclasses.asdict(config.mla)
    return common | widths | {"q_lora_rank": config.mla.q_lora_rank or None, "rope_interleave": True}


def from_hf(hf: Mapping[str, Any]) -> Imported:
    """The model that a config.json describes.

    Raises ConfigError that names every key of it that our model has no place for.
    """
    kind = str(hf.get("model_type"))
    if kind not in (*CLASSES, *DENSE):
        raise ConfigError(f"config.json: model_type: {kind} cannot be read; known are {', '.join((*CLASSES, *DENSE))}")
    reader = _Reader(hf)
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    problems = _foreign_features(hf, rope, kind)
    fields: dict[str, Any] = {
        "hidden_size": reader.get("hidden_size"),
        "num_layers": reader.get("num_hidden_layers"),
        "dense_intermediate_size": reader.get("intermediate_size"),
        "num_heads": reader.get("num_attention_heads"),
        "norm_eps": reader.get("rms_norm_eps"),
        "rope_theta": float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0))),
        "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "init_std": float(hf.get("initializer_range", 0.02)),
    }
    fields["num_kv_heads"] = hf.get("num_key_value_heads") or fields["num_heads"]
    if kind == "deepseek_v3":
        widths = {
            name: reader.get(name) for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        }
        fields |= {"attention": "mla", "mla": LatentConfig(q_lora_rank=hf.get("q_lora_rank") or 0, **widths)}
        fields["num_kv_heads"] = fields["num_heads"]
    else:
        head_dim = hf.get("head_dim") or 0
        fields["head_dim"] = 0 if head_dim * fields["num_heads"] == fields["hidden_size"] else head_dim
        fields["attention_bias"] = bool(hf.get("attention_bias", kind == "qwen2"))
        fields["qk_norm"] = bool(hf.get("use_qk_norm", False)) if kind == "glm4_moe" else kind.startswith("qwen3")
        if kind == "glm4_moe":
            fields["partial_rotary"] = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 0.5))
    fields |= {"num_dense_layers": fields["num_layers"]} if kind in DENSE else _expert_fields(hf, reader, kind)
    vocab_size = reader.get("vocab_size")
    problems += reader.missing
    model = ModelConfig(**fields) if not reader.missing else ModelConfig()
    problems += model.problems()
    if problems:
        raise ConfigError(*(f"config.json: {line}" for line in problems))
    mtp_layers = hf.get("num_nextn_predict_layers") or hf.get("num_mtp_layers") or 0
    return Imported(model, vocab_size, has_selection_bias(kind), bool(hf.get("rope_interleave", True)), mtp_layers)


def _rotary_share(config: ModelConfig) -> float:
    """The share of a head that is turned, so that rounding head x share down gives the even width that ours turns."""
    if int(config.head_size * config.partial_rotary) == config.rotary_size:
        return config.partial_rotary
    return (config.rotary_size + 0.5) / config.head_size  # away from both neighbours: r / head x head may fall below r


class _Reader:
    """Reads required keys and remembers those that are not there."""

    def __init__(self, hf: Mapping[str, Any]) -> None:
        self._hf = hf
        self.missing: list[str] = []

    def get(self, key: str) -> Any:
        if self._hf.get(key) is None:
            self.missing.append(f"{key}: is missing")
            return 1
        return self._hf[key]


def _expert_fields(hf: Mapping[str, Any], reader: _Reader, kind: str) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "top_k": reader.get("num_experts_per_tok"),
        "expert_intermediate_size": reader.get("moe_intermediate_size"),
        "normalize_gates": bool(reader.get("norm_topk_prob")),
    }
    if kind != "qwen3_moe":
        return fields | {
            "router_score": "sigmoid",
            "num_experts": reader.get("n_routed_experts"),
            "num_shared_experts": hf.get("n_shared_experts") or 0,
            "num_groups": hf.get("n_group") or 1,
            "top_groups": hf.get("topk_group") or 1,
            "routed_scale": float(hf.get("routed_scaling_factor", 1.0)),
            "num_dense_layers": min(hf.get("first_k_dense_replace") or 0, reader.get("num_hidden_layers")),
        }
    num_experts, layers = hf.get("num_experts") or reader.get("num_local_experts"), reader.get("num_hidden_layers")
    only, every = hf.get("mlp_only_layers") or [], hf.get("decoder_sparse_step") or 1
    blocks = [0 if i in only or (i + 1) % every else num_experts for i in range(layers)]
    leading = next((i for i, experts in enumerate(blocks) if experts), layers)
    fields |= {"router_score": "softmax", "num_experts": num_experts, "num_shared_experts": 0}
    fields["num_dense_layers"] = leading
    return fields | ({} if all(blocks[leading:]) else {"layer_experts": tuple(blocks)})


def _foreign_features(hf: Mapping[str, Any], rope: Mapping[str, Any], kind: str) -> list[str]:
    """Keys that ask for something our decoder does not have."""
    found = []
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        found.append(f"rope_parameters: rope_type {rope_type} is not supported, only plain rotary positions")
    expected = {
        "hidden_act": "silu",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "mlp_bias": False,
        "use_sliding_window": False,
        "quantization_config": None,
    }
    for key, value in expected.items():
        if hf.get(key, value) not in (value, None):
            found.append(f"{key}: {hf[key]!r} is not supported, only {value!r}")
    if kind == "mistral" and hf.get("sliding_window"):
        found.append(f"sliding_window: {hf['sliding_window']} is not supported")
    if kind in ("deepseek_v3", "llama", "mistral") and hf.get("attention_bias"):
        found.append("attention_bias: true is not supported for this architecture: its output projection has one too")
    return found
