"""The same weights give the same logits as transformers' GLM-4-MoE, Qwen3-MoE and DeepSeek-V3."""

import pytest
import torch
from torch import nn

from moe.blocks import MoELayer
from moe.config import ModelConfig
from moe.latent import LatentConfig
from moe.model import MoEDecoder

transformers = pytest.importorskip("transformers")

VOCAB, HIDDEN, LAYERS, EXPERTS, FF = 96, 64, 3, 8, 24


def half_split(weight: torch.Tensor, *, heads: int, before: int, rotated: int) -> torch.Tensor:
    """Rows of a projection with each head's rotated pairs (x0, y0, x1, y1, ...) as (x0, x1, ..., y0, y1, ...)."""
    by_head = weight.view(heads, before + rotated, -1)
    pairs = by_head[:, before:].unflatten(1, (rotated // 2, 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat([by_head[:, :before], pairs], dim=1).flatten(0, 1)


def copy_latent_attention(ours: nn.Module, theirs: nn.Module) -> None:
    heads, nope, rotated = theirs.num_heads, theirs.qk_nope_head_dim, theirs.qk_rope_head_dim
    ours.output.weight.copy_(theirs.o_proj.weight)
    ours.kv_expand.weight.copy_(theirs.kv_b_proj.weight)
    ours.kv_norm.weight.copy_(theirs.kv_a_layernorm.weight)
    compress = half_split(theirs.kv_a_proj_with_mqa.weight, heads=1, before=theirs.kv_lora_rank, rotated=rotated)
    ours.kv_compress.weight.copy_(compress)
    if theirs.q_lora_rank is None:
        ours.query.weight.copy_(half_split(theirs.q_proj.weight, heads=heads, before=nope, rotated=rotated))
        return
    ours.query_compress.weight.copy_(theirs.q_a_proj.weight)
    ours.query_norm.weight.copy_(theirs.q_a_layernorm.weight)
    ours.query_expand.weight.copy_(half_split(theirs.q_b_proj.weight, heads=heads, before=nope, rotated=rotated))


def copy_attention(ours: nn.Module, theirs: nn.Module) -> None:
    if hasattr(theirs, "kv_b_proj"):
        return copy_latent_attention(ours, theirs)
    for mine, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "o_proj")):
        getattr(ours, mine).load_state_dict(getattr(theirs, name).state_dict())
    for mine, name in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
        if hasattr(theirs, name):
            getattr(ours, mine).weight.copy_(getattr(theirs, name).weight)
    return None


def copy_feed_forward(ours: nn.Module, theirs: nn.Module) -> None:
    ours.gate_up.weight.copy_(torch.cat([theirs.gate_proj.weight, theirs.up_proj.weight]))
    ours.down.weight.copy_(theirs.down_proj.weight)


@torch.no_grad()
def copy_weights(ours: MoEDecoder, theirs: nn.Module) -> None:
    """Every parameter of a transformers MoE decoder into ours; experts there are stacked [E, out, in]."""
    ours.embedding.weight.copy_(theirs.model.embed_tokens.weight)
    ours.final_norm.weight.copy_(theirs.model.norm.weight)
    ours.head.weight.copy_(theirs.lm_head.weight)
    for mine, layer in zip(ours.blocks, theirs.model.layers, strict=True):
        mine.attention_norm.weight.copy_(layer.input_layernorm.weight)
        mine.mlp_norm.weight.copy_(layer.post_attention_layernorm.weight)
        copy_attention(mine.attention, layer.self_attn)
        if not hasattr(layer.mlp, "experts"):
            copy_feed_forward(mine.mlp, layer.mlp)
            continue
        mine.mlp.router.weight.copy_(layer.mlp.gate.weight)
        mine.mlp.experts.gate_up.copy_(layer.mlp.experts.gate_up_proj.transpose(1, 2))
        mine.mlp.experts.down.copy_(layer.mlp.experts.down_proj.transpose(1, 2))
        if hasattr(layer.mlp.gate, "e_score_correction_bias"):
            mine.mlp.router.expert_bias_E.copy_(layer.mlp.gate.e_score_correction_bias)
        if hasattr(layer.mlp, "shared_experts"):
            copy_feed_forward(mine.mlp.shared, layer.mlp.shared_experts)


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    torch.manual_seed(0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" in name:
            continue
        tensor.copy_(torch.randn(tensor.shape) * (0.3 if "correction_bias" in name else 0.1) + ("norm" in name))


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_glm4_moe(groups: tuple[int, int]) -> None:
    theirs = transformers.Glm4MoeForCausalLM(
        transformers.Glm4MoeConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=80, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, partial_rotary_factor=0.5, rms_norm_eps=1e-5, attention_bias=True,
            use_qk_norm=True, n_routed_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=FF,
            n_shared_experts=2, first_k_dense_replace=1, n_group=groups[0], topk_group=groups[1],
            routed_scaling_factor=2.5, norm_topk_prob=True, tie_word_embeddings=False, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip
    randomize(theirs)
    ours = MoEDecoder(
        ModelConfig(
            hidden_size=HIDDEN, num_layers=LAYERS, num_dense_layers=1, dense_intermediate_size=80, num_heads=4,
            num_kv_heads=2, head_dim=16, num_experts=EXPERTS, top_k=2, expert_intermediate_size=FF,
            num_shared_experts=2, router_score="sigmoid", normalize_gates=True, routed_scale=2.5, num_groups=groups[0],
            top_groups=groups[1], qk_norm=True, attention_bias=True, partial_rotary=0.5, norm_eps=1e-5,
            rope_theta=theirs.config.rope_parameters["rope_theta"],
        ),
        vocab_size=VOCAB,
    ).eval()  # fmt: skip
    compare(ours, theirs)


def test_qwen3_moe() -> None:
    theirs = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=80, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, num_experts=EXPERTS, num_experts_per_tok=3, moe_intermediate_size=FF,
            norm_topk_prob=True, tie_word_embeddings=False, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip
    randomize(theirs)
    ours = MoEDecoder(
        ModelConfig(
            hidden_size=HIDDEN, num_layers=LAYERS, num_dense_layers=0, num_heads=4, num_kv_heads=2, head_dim=16,
            num_experts=EXPERTS, top_k=3, expert_intermediate_size=FF, num_shared_experts=0, router_score="softmax",
            normalize_gates=True, qk_norm=True, norm_eps=theirs.config.rms_norm_eps,
            rope_theta=theirs.config.rope_parameters["rope_theta"],
        ),
        vocab_size=VOCAB,
    ).eval()  # fmt: skip
    compare(ours, theirs)


@pytest.mark.parametrize("query_rank", [24, None])
@pytest.mark.parametrize("value_size", [20, 36])
def test_deepseek_v3(query_rank: int | None, value_size: int) -> None:
    """With and without a query latent, values narrower and wider than queries."""
    theirs = transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=80, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=4, q_lora_rank=query_rank, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=12,
            v_head_dim=value_size, rms_norm_eps=1e-5, n_routed_experts=EXPERTS, num_experts_per_tok=2,
            moe_intermediate_size=FF, n_shared_experts=1, first_k_dense_replace=1, n_group=4, topk_group=2,
            routed_scaling_factor=2.5, norm_topk_prob=True, tie_word_embeddings=False, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip
    randomize(theirs)
    ours = MoEDecoder(
        ModelConfig(
            hidden_size=HIDDEN, num_layers=LAYERS, num_dense_layers=1, dense_intermediate_size=80, num_heads=4,
            num_kv_heads=4, attention="mla", num_experts=EXPERTS, top_k=2, expert_intermediate_size=FF,
            num_shared_experts=1, routed_scale=2.5, num_groups=4, top_groups=2, norm_eps=1e-5,
            rope_theta=theirs.config.rope_parameters["rope_theta"],
            mla=LatentConfig(
                q_lora_rank=query_rank or 0, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=12,
                v_head_dim=value_size,
            ),
        ),
        vocab_size=VOCAB,
    ).eval()  # fmt: skip
    compare(ours, theirs)


def compare(ours: MoEDecoder, theirs: nn.Module) -> None:
    copy_weights(ours, theirs)
    tokens_BT = torch.randint(0, VOCAB, (3, 33), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = theirs(tokens_BT).logits, ours(tokens_BT)
    assert expected.std() > 0.1, "logits that say something"
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


@torch.no_grad()
def test_deepseek_v3_layer() -> None:
    """The whole MoE layer of DeepSeek-V3: groups, correction bias, routed scale, shared experts."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = transformers.DeepseekV3Config(
        hidden_size=HIDDEN, moe_intermediate_size=FF, n_routed_experts=16, num_experts_per_tok=4, n_shared_experts=1,
        n_group=4, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    theirs = DeepseekV3MoE(config).eval()
    randomize(theirs)
    ours = MoELayer(
        ModelConfig(
            hidden_size=HIDDEN, num_experts=16, top_k=4, expert_intermediate_size=FF, num_shared_experts=1,
            num_groups=4, top_groups=2, routed_scale=2.5, num_heads=4,
        ),
        parallel_size=1,
    ).eval()  # fmt: skip
    ours.router.weight.copy_(theirs.gate.weight)
    ours.router.expert_bias_E.copy_(theirs.gate.e_score_correction_bias)
    ours.experts.gate_up.copy_(theirs.experts.gate_up_proj.transpose(1, 2))
    ours.experts.down.copy_(theirs.experts.down_proj.transpose(1, 2))
    copy_feed_forward(ours.shared, theirs.shared_experts)
    x_BTD = torch.randn(2, 30, HIDDEN, generator=torch.Generator().manual_seed(4))
    expected = theirs(x_BTD)
    found, _ = ours(x_BTD, torch.ones(2, 30, dtype=torch.bool))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
