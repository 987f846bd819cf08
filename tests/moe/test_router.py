"""Selection by biased scores, gates from unbiased ones."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from moe.config import ModelConfig
from moe.model import MoEDecoder
from moe.router import Router, count_tokens, gates_of, select_experts, within_capacity
from trainer.errors import ConfigError


def test_bias_changes_the_selection_but_not_the_gates() -> None:
    scores_NE = torch.tensor([[0.9, 0.8, 0.1, 0.2]])
    bias_E = torch.tensor([0.0, -1.0, 0.0, 0.0])
    indices_NK = select_experts(scores_NE, bias_E, top_k=2)
    assert indices_NK.tolist() == [[0, 3]]
    gates_NK = gates_of(scores_NE, indices_NK, normalize=True, scale=2.5)
    assert gates_NK.tolist() == [pytest.approx([2.5 * 0.9 / 1.1, 2.5 * 0.2 / 1.1])]
    assert gates_of(scores_NE, indices_NK, normalize=False, scale=1.0).tolist() == [pytest.approx([0.9, 0.2])]


@given(seed=st.integers(0, 2**31), top_k=st.integers(1, 8), spread=st.floats(0, 2))
def test_selection_is_the_k_largest_biased_scores(seed: int, top_k: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores_NE = torch.rand(17, 8, generator=generator)
    bias_E = spread * torch.randn(8, generator=generator)
    indices_NK = select_experts(scores_NE, bias_E, top_k=top_k)
    biased_NE = scores_NE + bias_E
    chosen = biased_NE.gather(1, indices_NK).sort(descending=True).values
    assert torch.equal(chosen, biased_NE.sort(descending=True).values[:, :top_k])
    assert all(len(set(row)) == top_k for row in indices_NK.tolist())


@given(seed=st.integers(0, 2**31))
def test_selection_ignores_what_all_biases_share(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores_NE = torch.rand(32, 8, generator=generator, dtype=torch.float64)
    bias_E = torch.randn(8, generator=generator, dtype=torch.float64)
    assert torch.equal(select_experts(scores_NE, bias_E, top_k=3), select_experts(scores_NE, bias_E + 0.25, top_k=3))


@pytest.mark.parametrize(("score", "groups"), [("sigmoid", None), ("sigmoid", (4, 2)), ("softmax", None)])
def test_equals_megatron_core(score: str, groups: tuple[int, int] | None) -> None:
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    torch.manual_seed(0)
    logits_NE, bias_E = torch.randn(64, 16), 0.3 * torch.randn(16)
    num_groups, top_groups = groups or (1, 1)
    if score == "softmax":
        bias_E = torch.zeros(16)  # megatron-core ignores a bias there
    probabilities_NE, map_NE = topk_routing_with_score_function(
        logits_NE, 4, use_pre_softmax=True, num_groups=groups and num_groups, group_topk=groups and top_groups,
        scaling_factor=2.5, score_function=score, expert_bias=bias_E if score == "sigmoid" else None,
    )  # fmt: skip
    scores_NE = logits_NE.sigmoid() if score == "sigmoid" else logits_NE.softmax(-1)
    indices_NK = select_experts(scores_NE, bias_E, top_k=4, num_groups=num_groups, top_groups=top_groups)
    gates_NK = gates_of(scores_NE, indices_NK, normalize=score == "sigmoid", scale=2.5)
    ours_NE = torch.zeros_like(logits_NE).scatter_(1, indices_NK, gates_NK)
    assert torch.equal(ours_NE > 0, map_NE)
    torch.testing.assert_close(ours_NE, probabilities_NE, rtol=1e-5, atol=1e-6)


def test_groups_limit_where_experts_come_from() -> None:
    scores_NE = torch.tensor([[0.9, 0.0, 0.5, 0.5, 0.3, 0.2]])  # group sums of the best two: .9, 1.0, .5
    indices_NK = select_experts(scores_NE, torch.zeros(6), top_k=2, num_groups=3, top_groups=1)
    assert sorted(indices_NK[0].tolist()) == [2, 3]


def test_counts_leave_padding_out() -> None:
    indices_NK = torch.tensor([[0, 1], [1, 2], [1, 3]])
    counted_N = torch.tensor([True, True, False])
    assert count_tokens(indices_NK, counted_N, 4).tolist() == [1, 2, 1, 0]


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_bias_stays_float32_and_exact_under_casts(cast: str) -> None:
    config = ModelConfig(
        hidden_size=32, num_heads=4, num_kv_heads=4, num_experts=8, top_k=2, expert_intermediate_size=16
    )
    router = Router(config)
    router.expert_bias_E.copy_(torch.arange(8) * 1.001e-3)
    exact_E = router.expert_bias_E.clone()
    getattr(router, cast)()
    assert router.weight.dtype == getattr(torch, cast)
    assert router.expert_bias_E.dtype == torch.float32
    assert torch.equal(router.expert_bias_E, exact_E)
    assert torch.equal(router.state_dict()["expert_bias_E"], exact_E)


def test_bf16_model_routes_in_float32() -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        hidden_size=32, num_heads=4, num_kv_heads=4, num_experts=8, top_k=2, expert_intermediate_size=16
    )
    router = Router(config)
    torch.nn.init.normal_(router.weight)
    router.bfloat16()
    x_ND = torch.randn(64, 32).bfloat16()
    indices_NK, gates_NK, *_ = router(x_ND, torch.ones(64, dtype=torch.bool))
    exact_NE = (x_ND.float() @ router.weight.float().T).sigmoid()
    assert gates_NK.dtype == torch.float32
    assert torch.equal(indices_NK, exact_NE.topk(2).indices)


def test_bias_gets_no_gradient() -> None:
    config = ModelConfig(
        hidden_size=32, num_layers=2, num_dense_layers=0, num_heads=4, num_kv_heads=4, num_experts=8, top_k=2,
        expert_intermediate_size=16,
    )  # fmt: skip
    model = MoEDecoder(config, vocab_size=11)
    tokens_BT = torch.randint(0, 11, (2, 5))
    model(tokens_BT, tokens_BT).sum().backward()
    assert all(layer.router.expert_bias_E.grad is None for layer in model.moe_layers())
    assert all(layer.router.weight.grad.abs().sum() > 0 for layer in model.moe_layers())


def router_of(**changes: object) -> Router:
    config = ModelConfig(
        **({"hidden_size": 32, "num_heads": 4, "num_kv_heads": 4, "num_experts": 8, "top_k": 2,
            "expert_intermediate_size": 16} | changes)
    )  # fmt: skip
    assert not config.problems()
    torch.manual_seed(0)
    router = Router(config)
    torch.nn.init.normal_(router.weight)
    return router


X_ND = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
EVERYONE = torch.ones(40, dtype=torch.bool)


def test_sqrtsoftplus_scores() -> None:
    routing = router_of(router_score="sqrtsoftplus")(X_ND, EVERYONE)
    torch.testing.assert_close(routing.scores_NE.square(), torch.log1p(routing.logits_NE.exp()), rtol=1e-4, atol=1e-5)


def test_uniform_routing_is_perfectly_balanced() -> None:
    counts_E = router_of(uniform_routing=True)(X_ND, EVERYONE).stats.counts_E
    assert counts_E.tolist() == [10] * 8


def test_multiplicative_bias_scales_the_scores() -> None:
    router = router_of()
    router.prepare_balancing(multiplicative=True, collect_thresholds=False)
    plain = router(X_ND, EVERYONE).indices_NK
    assert torch.equal(plain, router_of()(X_ND, EVERYONE).indices_NK), "a factor of one changes nothing"
    router.expert_bias_E[3] = 0.0
    assert not (router(X_ND, EVERYONE).indices_NK == 3).any()


def test_jitter_only_in_training_and_replayed_with_the_generator() -> None:
    router = router_of(router_jitter=0.3)
    state = torch.get_rng_state()
    first = router(X_ND, EVERYONE).logits_NE
    torch.set_rng_state(state)
    assert torch.equal(router(X_ND, EVERYONE).logits_NE, first)
    assert not torch.equal(router(X_ND, EVERYONE).logits_NE, first)
    torch.testing.assert_close(router.eval()(X_ND, EVERYONE).logits_NE, X_ND @ router.weight.T)


@pytest.mark.parametrize("drop_by", ["score", "position"])
def test_padding_takes_no_capacity(drop_by: str) -> None:
    """Rows with padding keep and drop what the same rows without it do; the last token of a document is no padding."""
    torch.manual_seed(0)
    config = ModelConfig(
        hidden_size=32, num_layers=2, num_dense_layers=1, dense_intermediate_size=48, num_heads=4, num_kv_heads=2,
        num_experts=8, top_k=2, expert_intermediate_size=16, num_shared_experts=1, document_mask=True,
        capacity_factor=1.25, drop_by=drop_by, init_std=0.3,
    )  # fmt: skip
    model = MoEDecoder(config, vocab_size=64).train()
    tokens_BT, labels_BT = torch.randint(1, 64, (2, 8, 32))
    labels_BT[:, 15] = labels_BT[:, 31] = -100
    documents_BT = (torch.arange(32) // 16).repeat(8, 1)

    def padded(tensor_BT: torch.Tensor, value: int) -> torch.Tensor:
        return F.pad(tensor_BT, (0, 16), value=value)

    losses_BT = model(tokens_BT, labels_BT, documents_BT)
    alone = model.take_loads("train")[0]
    padded_BT = model(padded(tokens_BT, 0), padded(labels_BT, -100), padded(documents_BT, -1))
    among = model.take_loads("train")[0]
    assert alone.dropped > 10
    assert torch.equal(among.dropped, alone.dropped)
    assert torch.equal(among.counts_E, alone.counts_E)
    torch.testing.assert_close(padded_BT[:, :32], losses_BT)


@pytest.mark.parametrize("by", ["score", "position"])
def test_capacity_keeps_the_best_or_the_first(by: str) -> None:
    indices_NK = torch.tensor([[0], [0], [0], [1], [0]])
    gates_NK = torch.tensor([[0.1], [0.9], [0.5], [0.2], [0.7]])
    kept = within_capacity(indices_NK, gates_NK, capacity=2, num_experts=2, by=by).flatten().tolist()  # type: ignore[arg-type]
    assert kept == ([False, True, False, True, True] if by == "score" else [True, True, False, True, False])


@given(seed=st.integers(0, 2**31), factor=st.floats(0.1, 3))
def test_no_expert_exceeds_its_capacity_and_no_room_is_wasted(seed: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    gates_NK, indices_NK = (torch.rand(30, 6, generator=generator) * torch.arange(1, 7)).topk(2)
    capacity = max(1, int(factor * 10))
    for by in ("score", "position"):
        kept = within_capacity(indices_NK, gates_NK, capacity=capacity, num_experts=6, by=by)  # type: ignore[arg-type]
        before = torch.bincount(indices_NK.flatten(), minlength=6)
        after = torch.bincount(indices_NK[kept], minlength=6)
        assert torch.equal(after, before.clamp(max=capacity))


def test_dropped_choices_are_counted_and_get_no_gate() -> None:
    router = router_of(capacity_factor=0.5)
    routing = router(X_ND, EVERYONE)
    assert routing.stats.counts_E.sum() == 80, "loads are of what was chosen, dropped or not"
    assert routing.stats.dropped == (routing.gates_NK == 0).sum() > 0
    assert router_of()(X_ND, EVERYONE).stats.dropped == 0


def test_threshold_histogram_counts_every_token_once_for_each_expert() -> None:
    router = router_of()
    router.prepare_balancing(multiplicative=False, collect_thresholds=True)
    router.expert_bias_E.uniform_(-0.4, 0.4)
    counted = EVERYONE.clone()
    counted[:7] = False
    stats = router(X_ND, counted).stats
    assert stats.thresholds_EQ is not None
    assert stats.thresholds_EQ.sum(1).tolist() == [33] * 8
    assert router.eval()(X_ND, counted).stats.thresholds_EQ is None


@pytest.mark.parametrize(
    "changes", [{"router_score": "sqrtsoftplus"}, {"num_groups": 2, "top_groups": 1}, {"top_k": 8}]
)
def test_rules_that_need_thresholds_refuse_routers_that_have_none(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="quantile and bip"):
        router_of(**changes).prepare_balancing(multiplicative=False, collect_thresholds=True)
