"""The decoder: experts against a loop, losses, loads, recomputation, arithmetic."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from moe.arithmetic import count_parameters, flops_per_token
from moe.config import AuxLossConfig, ModelConfig
from moe.documents import Layout
from moe.grouped import experts_forward
from moe.latent import LatentConfig
from moe.layers import FeedForward, rotary_table
from moe.model import MoEDecoder

SMALL = ModelConfig(
    hidden_size=32, num_layers=3, num_dense_layers=1, dense_intermediate_size=40, num_heads=4, num_kv_heads=2,
    num_experts=8, top_k=2, expert_intermediate_size=16, num_shared_experts=1,
)  # fmt: skip
VOCAB = 50
LATENT = {
    "attention": "mla", "num_kv_heads": 4,
    "mla": LatentConfig(q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6),
}  # fmt: skip


def small_model(**changes: object) -> MoEDecoder:
    torch.manual_seed(0)
    return MoEDecoder(dataclasses.replace(SMALL, **changes), vocab_size=VOCAB)


def tokens_and_labels(batch: int = 3, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    stream = torch.randint(0, VOCAB, (batch, length + 1), generator=generator)
    return stream[:, :-1], stream[:, 1:].clone()


def naive_experts(
    x_ND: torch.Tensor, indices_NK: torch.Tensor, gates_NK: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    rows = []
    for x, experts, gates in zip(x_ND, indices_NK.tolist(), gates_NK, strict=True):
        total = torch.zeros_like(x)
        for expert, gate in zip(experts, gates, strict=True):
            g, u = (x @ gate_up[expert]).chunk(2)
            total = total + gate * ((F.silu(g) * u) @ down[expert])
        rows.append(total)
    return torch.stack(rows)


@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 20), top_k=st.integers(1, 4), skewed=st.booleans())
def test_experts_equal_a_loop_over_tokens(seed: int, tokens: int, top_k: int, skewed: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, 6, generator=generator)
    indices_NK = (
        (scores + torch.tensor([9.0, 8, 7, 6, 0, 0]) * skewed).topk(top_k).indices
    )  # skewed: experts 4, 5 empty
    leaves = [
        torch.randn(shape, generator=generator).requires_grad_()
        for shape in [(tokens, 8), (tokens, top_k), (6, 8, 32), (6, 16, 8)]
    ]
    x_ND, gates_NK, gate_up, down = leaves
    ours = experts_forward(x_ND, indices_NK, gates_NK, gate_up, down)
    theirs = naive_experts(x_ND, indices_NK, gates_NK, gate_up, down)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    cotangent = torch.randn(ours.shape, generator=generator)
    for mine, expected in zip(
        torch.autograd.grad(ours, leaves, cotangent), torch.autograd.grad(theirs, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-2)


def test_no_tokens_still_reach_every_parameter() -> None:
    x_ND = torch.empty(0, 8, requires_grad=True)
    gate_up, down = torch.randn(6, 8, 32, requires_grad=True), torch.randn(6, 16, 8, requires_grad=True)
    out = experts_forward(x_ND, torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2), gate_up, down)
    out.sum().backward()
    assert out.shape == (0, 8)
    assert gate_up.grad is not None
    assert not gate_up.grad.any()


def test_token_losses_are_cross_entropy_and_zero_where_ignored() -> None:
    model = small_model()
    tokens_BT, labels_BT = tokens_and_labels()
    labels_BT[1, 4:] = -100
    losses_BT = model(tokens_BT, labels_BT)
    expected_BT = F.cross_entropy(model(tokens_BT).transpose(1, 2), labels_BT, reduction="none", ignore_index=-100)
    torch.testing.assert_close(losses_BT, expected_BT)
    assert losses_BT.dtype == torch.float32
    assert not losses_BT[1, 4:].any()


@pytest.mark.parametrize("changes", [{}, LATENT])
def test_no_token_sees_the_future(changes: dict[str, object]) -> None:
    model = small_model(**changes).eval()
    tokens_BT, _ = tokens_and_labels()
    changed_BT = tokens_BT.clone()
    changed_BT[:, 7:] = (changed_BT[:, 7:] + 1) % VOCAB
    torch.testing.assert_close(model(tokens_BT)[:, :7], model(changed_BT)[:, :7], rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, LATENT])
def test_recomputation_changes_neither_gradients_nor_loads(changes: dict[str, object]) -> None:
    tokens_BT, labels_BT = tokens_and_labels()
    results = []
    for recompute in ("none", "block"):
        model = small_model(activation_recompute=recompute, dropout=0.2, **changes)
        torch.manual_seed(5)
        model(tokens_BT, labels_BT).mean().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append((gradients, model.take_counts("train")))
    (gradients, counts), (recomputed_gradients, recomputed_counts) = results
    for expected, found in zip(gradients, recomputed_gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    for expected, found in zip(counts, recomputed_counts, strict=True):
        assert torch.equal(found, expected)
        assert expected.sum() == tokens_BT.numel() * SMALL.top_k


def test_loads_are_of_training_forwards_with_gradients_only() -> None:
    model = small_model()
    tokens_BT, labels_BT = tokens_and_labels()
    labels_BT[0, 5:] = -100
    with torch.no_grad():
        model(tokens_BT, labels_BT)  # a scoring pass
    model.eval()
    with torch.no_grad():
        model(tokens_BT, labels_BT)
    model.train()
    assert not torch.stack(model.take_counts("train")).any()
    num_counted = int((labels_BT != -100).sum())
    for counts_E in model.take_counts("eval"):
        assert counts_E.sum() == num_counted * SMALL.top_k
    model(tokens_BT, labels_BT)
    model(tokens_BT, labels_BT)
    for counts_E in model.take_counts("train"):
        assert counts_E.dtype == torch.int64
        assert counts_E.sum() == 2 * num_counted * SMALL.top_k
    assert not torch.stack(model.take_counts("train")).any(), "taking them starts again from zero"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"qk_norm": True, "attention_bias": True, "num_shared_experts": 0, "num_dense_layers": 0},
        {"num_dense_layers": 3, "head_dim": 16, "partial_rotary": 0.5},
        {"mtp_weight": 0.3},
        LATENT,
        {**LATENT, "mla": dataclasses.replace(LATENT["mla"], q_lora_rank=0), "mtp_weight": 0.3},
        {"layer_experts": (0, 4, 8)},
        {"layer_experts": (4, 0, 16), "num_dense_layers": 0, "num_experts": 16, "mtp_weight": 0.3},
        {"layer_experts": (0, 0, 0)},
    ],
)
def test_arithmetic_equals_the_tensors(changes: dict[str, object]) -> None:
    config = dataclasses.replace(SMALL, **changes)
    assert not config.problems()
    with torch.device("meta"):
        model = MoEDecoder(config, vocab_size=VOCAB)
    count = count_parameters(config, VOCAB)
    assert count.num_total == sum(parameter.numel() for parameter in model.parameters())
    unused = sum(layer.num_experts - config.top_k for layer in model.moe_layers()) * 3 * 32 * 16
    assert count.num_active == count.num_total - unused


def test_layers_may_differ() -> None:
    """Experts of each block as configured, and everything that is counted by layer has its length."""
    model = small_model(
        layer_experts=(4, 0, 16), num_dense_layers=0, num_experts=16, aux_loss=AuxLossConfig(global_batch=1.0)
    )
    assert [layer.num_experts for layer in model.moe_layers()] == [4, 16]
    assert [layer.experts.down.shape[0] for layer in model.moe_layers()] == [4, 16]
    assert isinstance(model.blocks[1].mlp, FeedForward)
    tokens_BT, labels_BT = tokens_and_labels()
    _, features_BX, statistics_Y = model(tokens_BT, labels_BT)
    counts = model.take_counts("train")
    assert [len(counts_E) for counts_E in counts] == [4, 16]
    assert torch.equal(statistics_Y, torch.cat(counts))
    assert len(model.penalty_coefficients(statistics_Y)) == features_BX.shape[1] == 1 + 4 + 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_experts": (0, 8)}, "layer_experts: has 2 entries for num_layers 3"),
        ({"layer_experts": (8, 8, 8)}, "lower num_dense_layers"),
        ({"layer_experts": (0, -1, 8)}, "layer_experts: -1 is negative"),
        ({"layer_experts": (0, 4, 16)}, "num_experts: 8 is that of no block"),
        ({"layer_experts": (0, 1, 8)}, "top_k: 2 must be between 1 and an entry of layer_experts (1)"),
        ({"layer_experts": (0, 6, 8), "num_groups": 4}, "num_groups: 4 does not divide an entry of layer_experts (6)"),
        ({"layer_experts": (0, 0, 0), "mtp_weight": 0.1, "num_experts": 0}, "num_experts: 0 must be at least 1"),
    ],
)
def test_layers_that_contradict_the_rest_are_refused(changes: dict[str, object], message: str) -> None:
    problems = dataclasses.replace(SMALL, **changes).problems()
    assert len(problems) == 1, problems
    assert message in problems[0]


def test_deepseek_v3_has_as_many_parameters_as_its_paper_says() -> None:
    """671B parameters, 37B a token (arXiv 2412.19437, section 4.2)."""
    config = ModelConfig(
        hidden_size=7168, num_layers=61, num_dense_layers=3, dense_intermediate_size=18432, num_heads=128,
        num_kv_heads=128, num_experts=256, top_k=8, expert_intermediate_size=2048, num_shared_experts=1, num_groups=8,
        top_groups=4, routed_scale=2.5, attention="mla",
        mla=LatentConfig(
            q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
    )  # fmt: skip
    assert not config.problems()
    count = count_parameters(config, 129280)
    assert round(count.num_total / 1e9) == 671
    assert round((count.num_active - count.active["embedding"]) / 1e9) == 37


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "mla"}, "mla.kv_lora_rank: must be at least 1"),
        ({**LATENT, "attention": "gqa"}, "mla: is not read with attention gqa"),
        ({**LATENT, "num_kv_heads": 2}, "num_kv_heads: 2, but with attention mla"),
        ({**LATENT, "qk_norm": True}, "qk_norm: is not read with attention mla"),
        ({**LATENT, "mla": dataclasses.replace(LATENT["mla"], qk_rope_head_dim=3)}, "qk_rope_head_dim: 3 is odd"),
        ({**LATENT, "mla": dataclasses.replace(LATENT["mla"], q_lora_rank=-1)}, "mla.q_lora_rank: -1 is negative"),
    ],
)
def test_impossible_latent_attention_is_refused(changes: dict[str, object], message: str) -> None:
    problems = dataclasses.replace(SMALL, **changes).problems()
    assert message in problems[0], problems


@pytest.mark.parametrize(("changes", "widths"), [({}, 16), (LATENT, 18)])
def test_flops_equal_what_torch_counts(changes: dict[str, object], widths: int) -> None:
    """`widths`: of a key and a value head together."""
    from torch.utils.flop_counter import FlopCounterMode

    model = small_model(**changes)
    tokens_BT, labels_BT = tokens_and_labels(2, 16)
    with FlopCounterMode(display=False) as counter:
        model(tokens_BT, labels_BT).sum().backward()
    # Torch does not count attention on a CPU: everything else must agree exactly.
    uncounted = 3 * SMALL.num_layers * 16 * SMALL.num_heads * widths
    assert counter.get_total_flops() == (flops_per_token(model.config, VOCAB, 16) - uncounted) * tokens_BT.numel()


def test_initial_loss_is_that_of_a_uniform_guess() -> None:
    model = small_model()
    tokens_BT, labels_BT = tokens_and_labels(8, 16)
    assert model(tokens_BT, labels_BT).mean().item() == pytest.approx(torch.tensor(float(VOCAB)).log().item(), abs=0.05)


def test_tied_embeddings_are_one_tensor() -> None:
    model = small_model(tie_embeddings=True)
    assert model.head.weight is model.embedding.weight


def test_multi_token_prediction_predicts_the_token_after_the_next() -> None:
    """The extra loss is that of a block that sees token t+1 and is asked for token t+2, and of nothing later."""
    model = small_model(mtp_weight=0.5, num_experts=4)
    tokens_BT, labels_BT = tokens_and_labels(2, 8)
    labels_BT[1, 6:] = -100
    losses_BT, features_BX, statistics_Y = model(tokens_BT, labels_BT)
    plain = small_model(num_experts=4)
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(losses_BT, plain(tokens_BT, labels_BT))
    assert len(model.moe_layers()) == 3
    assert statistics_Y.split(4)[2].sum() == (labels_BT != -100).sum() * SMALL.top_k

    x_BTD, _ = model._hidden(tokens_BT, *model._layout(tokens_BT, labels_BT, None))
    expected = []
    for row in range(2):
        labels = labels_BT[row][labels_BT[row] != -100]
        length = len(labels)
        next_D = model.embedding(labels)
        layout = Layout(*rotary_table(length, SMALL.head_size, SMALL.rope_theta), mask=None)
        hidden, _ = model.next_token(
            x_BTD[row : row + 1, :length], next_D.unsqueeze(0), layout, torch.ones(1, length, dtype=torch.bool)
        )
        expected.append(0.5 * F.cross_entropy(model.head(hidden)[0, :-1], labels[1:]))
    torch.testing.assert_close(features_BX.flatten(), torch.stack(expected))
    assert isinstance(model.eval()(tokens_BT, labels_BT), torch.Tensor), "evaluation is of the next token alone"
    model.train()
    (losses_BT.mean() + features_BX.mean()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
