"""Where each of our tensors lies in a Hugging Face folder, and how it is cut and turned there.

Every change is a permutation, a cut or a transposition: going there and back gives the same bits.

Shape letters: D model width, F width of a feed-forward, E experts, r rotated elements of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.config import ModelConfig


@dataclass(frozen=True)
class Part:
    """One of our matrices (of stacked experts: one expert's) as one or several tensors of theirs."""

    theirs: tuple[str, ...]
    split: Callable[[Tensor], Sequence[Tensor]]
    """Ours to theirs."""
    join: Callable[[Sequence[Tensor]], Tensor]
    """Theirs to ours."""


@dataclass(frozen=True)
class Place:
    """A tensor of ours, as it is called in `MoEDecoder`, and its parts there."""

    ours: str
    parts: tuple[Part, ...]
    """One, or one an expert in the order of the first dimension."""
    stacked: bool = False


def layout(config: ModelConfig, *, has_bias: bool, interleaved: bool = True) -> Iterator[Place]:
    """The tensors of `MoEDecoder(config)` in Hugging Face's naming, which its MoE decoders share; without MTP's block.

    `has_bias`: whether the architecture's router has a selection bias. `interleaved`: whether its files interleave the
    rotated pairs of latent attention.
    """
    yield _same("embedding.weight", "model.embed_tokens.weight")
    for i, experts in enumerate(config.block_experts[: config.num_layers]):
        mine, theirs = f"blocks.{i}.", f"model.layers.{i}."
        yield _same(f"{mine}attention_norm.weight", f"{theirs}input_layernorm.weight")
        attention = _latent if config.attention == "mla" else _grouped
        yield from attention(config, f"{mine}attention.", f"{theirs}self_attn.", interleaved=interleaved)
        yield _same(f"{mine}mlp_norm.weight", f"{theirs}post_attention_layernorm.weight")
        if not experts:
            yield from _feed_forward(f"{mine}mlp.", f"{theirs}mlp.")
            continue
        yield _same(f"{mine}mlp.router.weight", f"{theirs}mlp.gate.weight")
        if has_bias:
            yield _same(f"{mine}mlp.router.expert_bias_E", f"{theirs}mlp.gate.e_score_correction_bias")
        yield from _experts(experts, f"{mine}mlp.experts.", f"{theirs}mlp.experts.")
        if config.num_shared_experts:
            yield from _feed_forward(f"{mine}mlp.shared.", f"{theirs}mlp.shared_experts.")
    yield _same("final_norm.weight", "model.norm.weight")
    if not config.tie_embeddings:
        yield _same("head.weight", "lm_head.weight")


def interleave(weight: Tensor, *, heads: int, before: int, rotated: int) -> Tensor:
    """Rows of a projection, in each head after `before` untouched ones, from (x0, x1, .., y0, y1, ..) to pairs (x, y).

    [heads * (before + rotated), D] of either shape; `deinterleave` is the inverse.
    """
    kept, turned = weight.unflatten(0, (heads, before + rotated)).split([before, rotated], dim=1)
    pairs = turned.unflatten(1, (2, rotated // 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat([kept, pairs], dim=1).flatten(0, 1)


def deinterleave(weight: Tensor, *, heads: int, before: int, rotated: int) -> Tensor:
    """The inverse of `interleave`."""
    kept, pairs = weight.unflatten(0, (heads, before + rotated)).split([before, rotated], dim=1)
    turned = pairs.unflatten(1, (rotated // 2, 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat([kept, turned], dim=1).flatten(0, 1)


def _same(ours: str, theirs: str) -> Place:
    return Place(ours, (Part((theirs,), lambda tensor: (tensor,), lambda tensors: tensors[0]),))


def _grouped(config: ModelConfig, ours: str, theirs: str, *, interleaved: bool) -> Iterator[Place]:
    for mine, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        yield _same(f"{ours}{mine}.weight", f"{theirs}{name}.weight")
        if config.attention_bias:
            yield _same(f"{ours}{mine}.bias", f"{theirs}{name}.bias")
    yield _same(f"{ours}output.weight", f"{theirs}o_proj.weight")
    if config.qk_norm:
        yield _same(f"{ours}query_norm.weight", f"{theirs}q_norm.weight")
        yield _same(f"{ours}key_norm.weight", f"{theirs}k_norm.weight")


def _latent(config: ModelConfig, ours: str, theirs: str, *, interleaved: bool) -> Iterator[Place]:
    shape, heads = config.mla, config.num_heads

    def rotated(mine: str, name: str, *, heads: int, before: int) -> Place:
        if not interleaved:
            return _same(ours + mine, theirs + name)
        sizes = {"heads": heads, "before": before, "rotated": shape.qk_rope_head_dim}
        part = Part(
            (theirs + name,),
            lambda tensor: (interleave(tensor, **sizes),),
            lambda tensors: deinterleave(tensors[0], **sizes),
        )
        return Place(ours + mine, (part,))

    if shape.q_lora_rank:
        yield _same(f"{ours}query_compress.weight", f"{theirs}q_a_proj.weight")
        yield _same(f"{ours}query_norm.weight", f"{theirs}q_a_layernorm.weight")
        yield rotated("query_expand.weight", "q_b_proj.weight", heads=heads, before=shape.qk_nope_head_dim)
    else:
        yield rotated("query.weight", "q_proj.weight", heads=heads, before=shape.qk_nope_head_dim)
    yield rotated("kv_compress.weight", "kv_a_proj_with_mqa.weight", heads=1, before=shape.kv_lora_rank)
    yield _same(f"{ours}kv_norm.weight", f"{theirs}kv_a_layernorm.weight")
    yield _same(f"{ours}kv_expand.weight", f"{theirs}kv_b_proj.weight")
    yield _same(f"{ours}output.weight", f"{theirs}o_proj.weight")


def _feed_forward(ours: str, theirs: str) -> Iterator[Place]:
    halves = Part(
        (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"),
        lambda tensor: tensor.chunk(2),
        lambda two: torch.cat([*two]),
    )
    yield Place(f"{ours}gate_up.weight", (halves,))
    yield _same(f"{ours}down.weight", f"{theirs}down_proj.weight")


def _experts(experts: int, ours: str, theirs: str) -> Iterator[Place]:
    """Ours are [E, D, 2F] and [E, F, D] for grouped products; theirs a Linear's [F, D] and [D, F], one by one."""
    gate_up = tuple(
        Part(
            (f"{theirs}{e}.gate_proj.weight", f"{theirs}{e}.up_proj.weight"),
            lambda tensor_DF: tensor_DF.T.chunk(2),
            lambda two: torch.cat([*two]).T,
        )
        for e in range(experts)
    )
    down = tuple(
        Part((f"{theirs}{e}.down_proj.weight",), lambda tensor: (tensor.T,), lambda tensors: tensors[0].T)
        for e in range(experts)
    )
    yield Place(f"{ours}gate_up", gate_up, stacked=True)
    yield Place(f"{ours}down", down, stacked=True)
