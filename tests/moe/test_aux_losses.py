"""Auxiliary losses: values, gradients, and independence of how the batch is cut."""

import dataclasses

import pytest
import torch

from moe.aux_losses import choice_shares, mean_probabilities, sequence_loss, switch_loss, z_loss
from moe.config import AuxLossConfig
from tests.moe.test_model import SMALL, small_model, tokens_and_labels

BATCH, LENGTH, EXPERTS, TOP_K = 3, 10, 8, 2
ALL = torch.ones(BATCH, LENGTH, dtype=torch.bool)


def random_scores() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(BATCH, LENGTH, EXPERTS).sigmoid()


def test_perfect_balance_costs_one() -> None:
    scores = torch.full((1, 8, 8), 0.1) + 0.5 * torch.eye(8)
    counted = torch.ones(1, 8, dtype=torch.bool)
    assert sequence_loss(scores, counted, 1).item() == pytest.approx(1)
    assert switch_loss(scores, scores.topk(1).indices, counted).tolist() == pytest.approx([1])


def test_equal_to_megatron_core() -> None:
    from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func, z_loss_func

    scores = random_scores()
    indices = scores.topk(TOP_K).indices
    probabilities = (scores / scores.sum(-1, keepdim=True)).flatten(0, 1)
    counts = torch.bincount(indices.flatten(), minlength=EXPERTS)
    tokens = BATCH * LENGTH
    theirs = switch_load_balancing_loss_func(
        probabilities, counts, total_num_tokens=tokens, topk=TOP_K, num_experts=EXPERTS, moe_aux_loss_coeff=0.1
    )
    assert 0.1 * switch_loss(scores, indices, ALL)[0].item() == pytest.approx(theirs.item(), rel=1e-5)
    logits = torch.randn(BATCH, LENGTH, EXPERTS)
    expected = z_loss_func(logits.flatten(0, 1), 1.0)
    assert z_loss(logits, ALL).mean().item() == pytest.approx(expected.item(), rel=1e-5)


def test_sequence_loss_sees_one_sequence_at_a_time() -> None:
    scores = random_scores()
    together = sequence_loss(scores, ALL, TOP_K)
    alone = torch.cat([sequence_loss(scores[i : i + 1], ALL[:1], TOP_K) for i in range(BATCH)])
    torch.testing.assert_close(together, alone)


def test_padding_counts_nowhere() -> None:
    scores = random_scores()
    counted = ALL.clone()
    counted[:, 6:] = False
    junk = scores.clone()
    junk[:, 6:] = 0.99
    indices = scores.topk(TOP_K).indices
    for loss in (
        lambda s: sequence_loss(s, counted, TOP_K),
        lambda s: switch_loss(s, indices, counted),
        lambda s: z_loss(s, counted),
        lambda s: mean_probabilities(s, counted),
    ):
        torch.testing.assert_close(loss(junk), loss(scores))
    torch.testing.assert_close(sequence_loss(scores, counted, TOP_K), sequence_loss(scores[:, :6], ALL[:, :6], TOP_K))
    assert not choice_shares(indices, torch.zeros_like(counted), EXPERTS).any()


def test_the_model_gives_a_linear_form_of_the_whole_step() -> None:
    """global_batch is E sum f_i P_i with f over all the step's tokens, whatever the micro-batches."""
    model = small_model(aux_loss=AuxLossConfig(global_batch=0.5))
    tokens_BT, labels_BT = tokens_and_labels(4)

    def penalty(sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [model(t, la) for t, la in zip(tokens_BT.split(sizes), labels_BT.split(sizes), strict=True)]
        statistics = torch.stack([part[2] for part in parts]).sum(0)
        features = torch.cat([part[1] for part in parts])
        value = (features @ model.penalty_coefficients(statistics)).mean()
        return value, torch.autograd.grad(value, model.moe_layers()[0].router.weight)[0]

    whole, whole_gradient = penalty([4])
    cut, cut_gradient = penalty([1, 2, 1])
    torch.testing.assert_close(cut, whole)
    torch.testing.assert_close(cut_gradient, whole_gradient, rtol=1e-4, atol=1e-8)

    expected = torch.zeros(())
    counts = model(tokens_BT, labels_BT)[2].split(SMALL.num_experts)
    probabilities = model(tokens_BT, labels_BT)[1][:, 1:].mean(0).split(SMALL.num_experts)
    for counts_E, mean_E in zip(counts, probabilities, strict=True):
        expected = expected + 0.5 * SMALL.num_experts * (counts_E / counts_E.sum() * mean_E).sum()
    torch.testing.assert_close(whole, expected)


def test_without_coefficients_the_model_returns_losses_alone() -> None:
    tokens_BT, labels_BT = tokens_and_labels()
    assert isinstance(small_model()(tokens_BT, labels_BT), torch.Tensor)
    model = small_model(aux_loss=AuxLossConfig(switch=0.1, sequence=0.1, z=0.1))
    assert isinstance(model.eval()(tokens_BT, labels_BT), torch.Tensor), "evaluation has no auxiliary loss"
    assert not model.needs_whole_step
    losses_BT, features_BX, _ = model.train()(tokens_BT, labels_BT)
    assert losses_BT.shape == labels_BT.shape
    assert features_BX.shape == (len(tokens_BT), 1)


@pytest.mark.parametrize("name", ["switch", "sequence", "global_batch", "z"])
def test_descending_a_loss_lowers_it_and_its_imbalance(name: str) -> None:
    model = small_model(aux_loss=AuxLossConfig(**{name: 1.0}))
    tokens_BT, labels_BT = tokens_and_labels(6, 20)
    with torch.no_grad():
        for layer in model.moe_layers():
            layer.router.weight.mul_(30)
    routers = [layer.router.weight for layer in model.moe_layers()]
    optimizer = torch.optim.SGD(routers, lr=1.0)
    values = []
    for _ in range(20):
        _, features_BX, statistics_Y = model(tokens_BT, labels_BT)
        value = (features_BX @ model.penalty_coefficients(statistics_Y)).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0]


def test_recomputation_does_not_count_the_losses_twice() -> None:
    tokens_BT, labels_BT = tokens_and_labels()
    gradients = []
    for recompute in ("none", "block"):
        aux = AuxLossConfig(switch=0.1, sequence=0.2, global_batch=0.3, z=0.01)
        model = small_model(activation_recompute=recompute, aux_loss=aux)
        losses_BT, features_BX, statistics_Y = model(tokens_BT, labels_BT)
        (losses_BT.mean() + (features_BX @ model.penalty_coefficients(statistics_Y)).mean()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-8)


def test_config_refuses_negative_coefficients() -> None:
    config = dataclasses.replace(SMALL, aux_loss=AuxLossConfig(switch=-1.0))
    assert config.problems() == ["aux_loss.switch: -1.0 must be finite and not negative"]
