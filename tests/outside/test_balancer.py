"""BiasBalancer around models of transformers: what counts, when the bias moves, and that nothing loses it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moe.foreign_routers import ForeignRouter, find_routers
from moe.outside import BiasBalancer
from moe.rules import RULES
from tests.outside.families import experts_of, output_of, tiny_model
from trainer.errors import ConfigError

IDS = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(0))
TOP_K = 2


def total(balancer: BiasBalancer, applied: bool = True) -> list[int]:
    return [int(counts_E.sum()) for counts_E in balancer.step(applied=applied).counts.values()]


def same_state(one: BiasBalancer, other: dict[str, Any]) -> bool:
    state = one.state_dict()
    return state.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
        for key, value in state.items()
    )


def forward_and_backward(model: nn.Module, ids_BT: Tensor = IDS, **inputs: Any) -> None:
    output_of(model, ids_BT, **inputs).float().square().mean().backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_forwards_are_not_counted_again(use_reentrant: bool) -> None:
    model = tiny_model("deepseek_v3").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    balancer = BiasBalancer(model)
    calls = []
    for experts in experts_of(model).values():
        experts.register_forward_pre_hook(lambda module, args: calls.append(None))
    forward_and_backward(model)
    assert len(calls) == 4  # two layers, each once more in the backward
    assert total(balancer) == [IDS.numel() * TOP_K] * 2


def test_only_training_forwards_count() -> None:
    model = tiny_model("glm4_moe").train()
    balancer = BiasBalancer(model)
    forward_and_backward(model)
    with torch.no_grad():  # a first pass that only looks at losses
        output_of(model, IDS)
    model.eval()
    output_of(model, IDS)
    model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert total(balancer) == [IDS.numel() * TOP_K] * 2
    assert total(balancer, applied=False) == [0, 0]


def test_micro_batches_add_up_and_a_part_of_the_model_may_be_called() -> None:
    model = tiny_model("glm4_moe").train()
    balancer = BiasBalancer(model)
    forward_and_backward(model)
    model.model(input_ids=IDS).last_hidden_state.sum().backward()
    assert total(balancer) == [2 * IDS.numel() * TOP_K] * 2


@pytest.mark.parametrize("positional", [False, True])
def test_padding_is_not_counted(positional: bool) -> None:
    model = tiny_model("minimax_m2").train()
    balancer = BiasBalancer(model)
    mask_BT = torch.ones_like(IDS)
    mask_BT[0, 10:] = 0
    if positional:
        model(IDS, mask_BT)
    else:
        model(input_ids=IDS, attention_mask=mask_BT)
    assert total(balancer) == [int(mask_BT.sum()) * TOP_K] * 2


def test_a_skipped_step_moves_nothing_and_leaves_nothing() -> None:
    model = tiny_model("glm4_moe").train()
    balancer = BiasBalancer(model, rule="pid")
    forward_and_backward(model)
    before = balancer.state_dict()
    balancer.step(applied=False)
    assert same_state(balancer, before)
    forward_and_backward(model)
    assert total(balancer) == [IDS.numel() * TOP_K] * 2
    assert all(bias_E.any() for bias_E in balancer.biases.values())


def test_a_balancer_that_sees_nothing_says_so() -> None:
    balancer = BiasBalancer(tiny_model("glm4_moe"))
    output_of(tiny_model("glm4_moe").train(), IDS)
    with pytest.raises(ConfigError, match="no router was seen at work"):
        balancer.step(applied=True)


@pytest.mark.parametrize("family", ["glm4_moe", "ernie4_5_moe", "minimax_m2", "lfm2_moe"])
def test_the_bias_stays_float32_and_survives_saving(family: str, tmp_path: Path) -> None:
    model = tiny_model(family).train()
    keys = set(model.state_dict())
    balancer = BiasBalancer(model, rate=1e-3)
    model.to(torch.bfloat16)
    for bias_E in balancer.biases.values():
        bias_E += 0.5
    for _ in range(3):
        forward_and_backward(model)
        balancer.step(applied=True)
    biases = balancer.biases
    moved = torch.stack(list(biases.values())) - 0.5
    assert moved.dtype == torch.float32
    assert 0 < moved.abs().max() < 3.1e-3  # in bfloat16 nothing would have moved: numbers next to 0.5 are 2e-3 apart
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert set(model.state_dict()) == keys

    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for router in find_routers(loaded):
        torch.testing.assert_close(router.bias_E.float(), biases[router.name], rtol=0, atol=0)
    copied = find_routers(copy.deepcopy(model))
    assert all(torch.equal(router.bias_E, biases[router.name]) for router in copied)
    assert not {router.bias_E.data_ptr() for router in copied} & {bias_E.data_ptr() for bias_E in biases.values()}


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if not rule.multiplicative])
def test_interrupted_and_resumed_equals_uninterrupted(rule: Any) -> None:
    def steps(balancer: BiasBalancer, model: nn.Module, first: int, last: int) -> None:
        for step in range(first, last):
            ids_BT = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(step))
            forward_and_backward(model, ids_BT)
            balancer.step(applied=True)

    model = tiny_model("glm4_moe").train()
    unbroken = BiasBalancer(model, rule=rule, rate=0.01)
    steps(unbroken, model, 0, 6)

    model = tiny_model("glm4_moe").train()
    first = BiasBalancer(model, rule=rule, rate=0.01)
    steps(first, model, 0, 3)
    saved = first.state_dict()
    model = tiny_model("glm4_moe").train()
    second = BiasBalancer(model, rule=rule, rate=0.01)
    second.load_state_dict(saved)
    steps(second, model, 3, 6)
    assert same_state(second, unbroken.state_dict())


def test_pid_starts_from_the_biases_it_finds_and_counts_from_its_own_first_step() -> None:
    model = tiny_model("glm4_moe").train()
    before = BiasBalancer(model, rule="sign", rate=0.05)
    for _ in range(8):
        forward_and_backward(model)
        before.step(applied=True)
    found = {name: bias_E.clone() for name, bias_E in before.biases.items()}
    assert max(bias_E.abs().max() for bias_E in found.values()) > 0.04
    before.close()
    balancer = BiasBalancer(model, rule="pid", rate=1e-3)
    balancer.load_state_dict(before.state_dict())
    assert balancer.state_dict()["updates"] == 0
    forward_and_backward(model)
    balancer.step(applied=True)
    for name, bias_E in balancer.biases.items():
        assert 0 < (bias_E - found[name]).abs().max() < 0.02


def test_quantile_balances_at_once_and_refuses_what_it_cannot_solve() -> None:
    model = tiny_model("deepseek_v3").train()
    with torch.no_grad():
        model.get_input_embeddings().weight += 0.1 * torch.randn(32)
    balancer = BiasBalancer(model, rule="quantile")
    ids_BT = torch.randint(3, 60, (8, 64))
    violations = []
    for _ in range(5):
        forward_and_backward(model, ids_BT)
        violations.append(float(balancer.step(applied=True).max_violation))
    assert violations[0] > 1
    assert violations[-1] < 0.2

    for family, settings in [("deepseek_v3", {"n_group": 4, "topk_group": 2}), ("kolibri1", {}), ("deepseek_v4", {})]:
        model = tiny_model(family, **settings).train()
        BiasBalancer(model, rule="quantile")
        with pytest.raises(ConfigError, match="choose another rule"):
            output_of(model, IDS)


class _Router(nn.Module):
    """Somebody's own: the bias has another name, and the output is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4))
        self.register_buffer("prices", torch.zeros(8))

    def forward(self, x_ND: Tensor) -> dict[str, Tensor]:
        scores_NE = (x_ND @ self.weight.T).sigmoid()
        return {"scores": scores_NE, "experts": (scores_NE + self.prices).topk(2, dim=-1).indices}


def test_routers_of_ones_own_can_be_named() -> None:
    model = _Router()
    with pytest.raises(ConfigError, match=r"_Router has no router with a selection bias.*e_score_correction_bias"):
        BiasBalancer(model)
    router = ForeignRouter(name="mine", module=model, owner=model, bias_name="prices", num_experts=8)
    balancer = BiasBalancer(model, routers=[router], rate=0.01)
    model.bfloat16()
    x_ND = torch.randn(512, 4).bfloat16() + 0.5
    violations = []
    for _ in range(60):
        model(x_ND)
        violations.append(float(balancer.step(applied=True).max_violation))
    assert model.prices.dtype == torch.float32
    assert violations[-1] < 0.3 * violations[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "sing"}, "unknown rule 'sing'"),
        ({"rule": "multiplicative"}, "adds it"),
        ({"rate": -1.0}, "rate: -1.0 must be finite and not negative"),
        ({"kappa": 3.0}, "options.kappa: rule sign does not read it"),
        ({"kapa": 3.0}, "unknown option kapa"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BiasBalancer(tiny_model("glm4_moe"), **settings)


def test_state_of_another_model_is_refused() -> None:
    state = BiasBalancer(tiny_model("glm4_moe", num_hidden_layers=3)).state_dict()
    with pytest.raises(ConfigError, match="saved balancer state has routers with"):
        BiasBalancer(tiny_model("glm4_moe")).load_state_dict(state)


def test_closing_stops_counting() -> None:
    model = tiny_model("glm4_moe").train()
    balancer = BiasBalancer(model)
    balancer.close()
    output_of(model, IDS)
    assert total(balancer, applied=False) == [0, 0]
