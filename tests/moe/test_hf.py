"""The words and layouts of Hugging Face and ours, as mathematics: inverses and equal functions."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from moe.config import ModelConfig
from moe.hf_config import Architecture, choose_architecture, export_problems, from_hf, has_selection_bias, to_hf
from moe.hf_layout import deinterleave, interleave, layout
from moe.latent import LatentConfig
from moe.model import MoEDecoder
from moe.router import gates_of, select_experts
from moe.upcycling import upcycle_down, upcycle_gate_up, upcycle_problems, upcycle_router

widths = st.sampled_from([8, 16, 24, 32])


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    layers, heads = draw(st.integers(1, 4)), draw(st.sampled_from([2, 4]))
    is_latent, groups = draw(st.booleans()), draw(st.sampled_from([1, 2]))
    shape = {
        "hidden_size": draw(widths),
        "num_layers": layers,
        "num_dense_layers": draw(st.integers(0, layers)),
        "dense_intermediate_size": draw(widths),
        "num_heads": heads,
        "num_experts": 8,
        "top_k": draw(st.integers(1, 4)),
        "expert_intermediate_size": draw(widths),
        "num_shared_experts": draw(st.integers(0, 2)),
        "router_score": draw(st.sampled_from(["sigmoid", "softmax"])),
        "normalize_gates": draw(st.booleans()),
        "routed_scale": draw(st.sampled_from([1.0, 2.5])),
        "num_groups": groups,
        "top_groups": draw(st.integers(1, groups)),
        "rope_theta": draw(st.sampled_from([1e4, 1e6])),
        "norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "tie_embeddings": draw(st.booleans()),
        "init_std": draw(st.sampled_from([0.006, 0.02])),
    }
    if is_latent:
        latent = LatentConfig(
            q_lora_rank=draw(st.sampled_from([0, 8])), kv_lora_rank=draw(widths), qk_nope_head_dim=draw(widths),
            qk_rope_head_dim=draw(widths), v_head_dim=draw(widths),
        )  # fmt: skip
        return ModelConfig(**shape, attention="mla", mla=latent, num_kv_heads=heads)
    return ModelConfig(
        **shape, num_kv_heads=draw(st.sampled_from([1, 2])), qk_norm=draw(st.booleans()),
        attention_bias=draw(st.booleans()), partial_rotary=draw(st.sampled_from([1.0, 0.5])),
    )  # fmt: skip


def described(config: ModelConfig, architecture: Architecture) -> dict[str, object]:
    return to_hf(config, architecture, vocab_size=40, max_positions=64, end=3, dtype="float32")


@given(config=configs())
def test_what_can_be_said_comes_back(config: ModelConfig) -> None:
    assume(not config.problems() and any(config.block_experts))  # a dense model says nothing of its router
    architecture = choose_architecture(config)
    assume(not export_problems(config, architecture))
    back = from_hf(described(config, architecture))
    assert (back.vocab_size, back.has_bias, back.mtp_layers) == (40, has_selection_bias(architecture), 0)
    assert back.model.rotary_size == config.rotary_size
    # A share that does not come out even is said as what is turned.
    assert dataclasses.replace(back.model, partial_rotary=config.partial_rotary) == config


@given(config=configs())
def test_every_tensor_has_a_place(config: ModelConfig) -> None:
    assume(not config.problems())
    with torch.device("meta"):
        model = MoEDecoder(config, vocab_size=40)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    places = list(layout(config, has_bias=True))
    assert [place.ours for place in places] == list(dict.fromkeys(place.ours for place in places))
    assert {place.ours for place in places} == own.keys()
    theirs = [name for place in places for part in place.parts for name in part.theirs]
    assert len(theirs) == len(set(theirs))
    for place in places:
        assert len(place.parts) == (own[place.ours].shape[0] if place.stacked else 1)


@given(heads=st.integers(1, 4), before=st.integers(0, 5), pairs=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_interleaving_has_an_inverse_and_pairs_what_turns_together(
    heads: int, before: int, pairs: int, seed: int
) -> None:
    weight = torch.randn(heads * (before + 2 * pairs), 3, generator=torch.Generator().manual_seed(seed))
    sizes = {"heads": heads, "before": before, "rotated": 2 * pairs}
    there = interleave(weight, **sizes)
    assert torch.equal(deinterleave(there, **sizes), weight)
    assert torch.equal(interleave(deinterleave(weight, **sizes), **sizes), weight)
    by_head, ours = there.unflatten(0, (heads, -1)), weight.unflatten(0, (heads, -1))
    assert torch.equal(by_head[:, before::2], ours[:, before : before + pairs])
    assert torch.equal(by_head[:, before + 1 :: 2], ours[:, before + pairs :])


@given(
    granularity=st.integers(1, 4), copies=st.integers(1, 4), chosen=st.integers(1, 4), seed=st.integers(0, 2**31),
    score=st.sampled_from(["sigmoid", "softmax"]),
)  # fmt: skip
def test_upcycled_experts_are_the_dense_function(
    granularity: int, copies: int, chosen: int, seed: int, score: str
) -> None:
    assume(chosen <= copies and (granularity * chosen > 1 or copies == 1))
    generator = torch.Generator().manual_seed(seed)
    width, inner, experts, top_k = 6, 4 * granularity, granularity * copies, granularity * chosen
    assert not upcycle_problems(width=inner, num_experts=experts, top_k=top_k, granularity=granularity)
    gate_up, down = (torch.randn(s, generator=generator).double() for s in ((2 * inner, width), (width, inner)))
    x_ND = torch.randn(5, width, generator=generator).double()
    gate, up = (x_ND @ gate_up.T).chunk(2, dim=-1)
    dense_ND = (F.silu(gate) * up) @ down.T

    sizes = {"num_experts": experts, "granularity": granularity}
    router = upcycle_router(**sizes, hidden_size=width, std=1.0, generator=generator).double()
    # By a sum in a fixed order, so that rows that are alike tie exactly.
    logits_NE = (x_ND.unsqueeze(1) * router).sum(dim=-1)
    scores_NE = logits_NE.sigmoid() if score == "sigmoid" else logits_NE.softmax(dim=-1)
    indices_NK = select_experts(scores_NE, torch.zeros(experts), top_k=top_k)
    gates_NK = gates_of(scores_NE, indices_NK, normalize=True, scale=float(granularity))
    wide, narrow = upcycle_gate_up(gate_up, **sizes), upcycle_down(down, **sizes)
    out_ND = torch.zeros_like(x_ND)
    for n in range(len(x_ND)):
        for expert, weight in zip(indices_NK[n].tolist(), gates_NK[n], strict=True):
            g, u = (x_ND[n] @ wide[expert]).chunk(2)
            out_ND[n] += weight * ((F.silu(g) * u) @ narrow[expert])
    torch.testing.assert_close(out_ND, dense_ND, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 10}, "--granularity: 4 does not divide the dense width (10)"),
        ({"granularity": 0}, "--granularity: 0 does not divide"),
        ({"num_experts": 6}, "--experts: 6 is not a multiple"),
        ({"top_k": 6}, "--top-k: 6 is not a multiple"),
        ({"top_k": 1, "granularity": 1}, "--top-k: 1 of several experts"),
        ({"top_k": 12}, "--top-k: 12 must be between 1 and --experts (8)"),
    ],
)
def test_upcycling_that_would_change_the_function_is_refused(changes: dict[str, int], message: str) -> None:
    problems = upcycle_problems(**({"width": 16, "num_experts": 8, "top_k": 4, "granularity": 4} | changes))
    assert message in problems[0]
