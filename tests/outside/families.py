"""A tiny random model of every family of transformers whose routers have a selection bias."""

import importlib
import inspect
import re
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from moe.foreign_routers import find_routers
from moe.outside import BiasBalancer
from trainer.errors import ConfigError

NUM_EXPERTS, TOP_K, VOCABULARY = 8, 2, 64

_BIAS = re.compile(r"\b(e_score_correction_bias|expert_bias|balancing_biases)\b")

_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
_FULL = {"layer_types": ["full_attention", "full_attention"]}
_LATENT = {"num_key_value_heads": 4}  # latent attention has as many key heads as heads

# What the fields of configurations are set to wherever they exist.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "n_routed_experts": NUM_EXPERTS, "num_experts": NUM_EXPERTS, "num_local_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K, "moe_topk": TOP_K, "moe_k": TOP_K,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "index_topk": 8, "index_n_heads": 2, "index_head_dim": 16,
    "expert_ffn_hidden_size": 16, "ffn_hidden_size": 48, "num_layers": 2, "shared_expert_intermediate_size": 16,
    "num_nextn_predict_layers": 0, "sliding_window": 16,
}  # fmt: skip

_SPECIAL: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 0},
    "axk1": _LATENT | _SPARSE,
    "axk2": _LATENT | _SPARSE,
    "bailing_hybrid": _LATENT | _FULL | _SPARSE,
    "beam": _SPARSE,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "deepseek_v4": {"mlp_layer_types": ["moe", "moe"], "o_groups": 2, "o_lora_rank": 8},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": _LATENT | _FULL | _SPARSE,
    "ernie4_5_moe": {"moe_layer_start_index": 0},
    "ernie4_5_vl_moe": _SPARSE | {
        "moe_intermediate_size": [16, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "glm4_moe_lite": _LATENT | _SPARSE,
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5,
        }
    },
    "glm5_next": _LATENT | _SPARSE | {"index_topk": 16, "qk_rope_head_dim": 0},
    "glm_moe_dsa": _LATENT | _SPARSE,
    "hy_v3": _SPARSE,
    "hy_v4": _SPARSE,
    "inkling": _SPARSE | {"d_rel": 4, "rel_extent": 16},
    "inkling2": _SPARSE,
    "kimi_linear": _LATENT | _FULL | _SPARSE,
    "laguna": _SPARSE,
    "lfm2_moe": _FULL | {"num_dense_layers": 0},
    "longcat_flash": _LATENT | {"zero_expert_num": 4},
    "mimo_v2_flash": _SPARSE,
    "nemotron_h": {"layers_block_type": ["attention", "moe"]},
    "step3p7": _SPARSE,
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

REFUSED = ("zaya",)


def families() -> list[str]:
    """All families of the installed transformers whose modelling code has such a bias."""
    root = Path(transformers.__file__).parent / "models"
    return sorted({f.parent.name for f in root.glob("*/modeling_*.py") if _BIAS.search(f.read_text())})


def tiny_model(family: str, **settings: Any) -> nn.Module:
    """The causal language model of a family, or its text model where it has none of its own."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    classes = [
        found
        for name, found in vars(module).items()
        if inspect.isclass(found)
        and found.__module__ == module.__name__
        and name.endswith(("ForCausalLM", "TextModel"))
    ]
    cls = min(classes, key=lambda found: not found.__name__.endswith("ForCausalLM"))
    known = {field.name for field in fields(cls.config_class)} | set(cls.config_class.attribute_map)
    common = {name: value for name, value in _COMMON.items() if name in known}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = cls(cls.config_class(**common | _SPECIAL.get(family, {}) | settings))
    with torch.no_grad():
        for weight in model.parameters():
            if (
                weight.requires_grad and weight.dim() == 2 and not weight.any()
            ):  # AFMoE's routers begin at zero: every token at the same experts
                weight.normal_(std=0.02)
    return model


def output_of(model: nn.Module, ids_BT: Tensor, **inputs: Any) -> Tensor:
    """Logits, or hidden states of a text model."""
    out = model(input_ids=ids_BT, use_cache=False, **inputs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that do the experts' work, by the name of the block they are in: they see what was selected."""
    return {
        name.removesuffix(".experts"): module
        for name, module in model.named_modules()
        if name.endswith(".experts") and "top_k_index" in inspect.signature(module.forward).parameters
    }


def block_of(model: nn.Module, router_name: str) -> nn.Module:
    """The experts that a router called `router_name` feeds."""
    return next(experts for name, experts in experts_of(model).items() if f"{router_name}.".startswith(f"{name}."))


def table() -> str:
    """Every family, where its bias is and which rules work, as the page has it (moe/OTHER_LOOPS.md)."""
    rows = ["| family | bias | rules |", "|---|---|---|"]
    for family in families():
        model = tiny_model(family).train()
        try:
            routers = find_routers(model)
        except ConfigError as error:
            rows.append(
                f"| `{family}` | | refused: {str(error).split(' ', 2)[2].removesuffix('; it is not supported')} |"
            )
            continue
        router, rules = routers[0], "all"
        BiasBalancer(model, rule="quantile")
        try:
            output_of(model, torch.randint(3, 60, (4, 16)))
        except ConfigError:
            rules = "all but `quantile` and `bip`"
        place = ".".join(router.name.split(".")[2 if router.name.startswith("layers.") else 3 :])
        rows.append(f"| `{family}` | `{place}.{router.bias_name}` | {rules} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
