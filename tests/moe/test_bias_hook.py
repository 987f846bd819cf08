"""The hook finds every router, moves it once for each applied step, and says when it cannot."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moe.bias_hook import ExpertBiasConfig, ExpertBiasHook, RateSchedule, rate_factor
from moe.config import ModelConfig
from moe.model import MoEDecoder
from trainer.errors import ConfigError
from trainer.hooks import EvaluationContext, HookList, RunContext, StepContext, StepResult

APPLIED, SKIPPED = StepResult(applied=True, reason=""), StepResult(applied=False, reason="test")


class Records:
    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def record(self, name: str, value: Any, reduction: str = "same") -> None:
        self.values[name] = value


def started(rule: str = "sign", clamp: float = 0.0, **changes: Any) -> tuple[ExpertBiasHook, MoEDecoder]:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32, "num_layers": 3, "num_dense_layers": 1, "dense_intermediate_size": 32, "num_heads": 4,
        "num_kv_heads": 4, "num_experts": 8, "top_k": 2, "expert_intermediate_size": 16,
    }  # fmt: skip
    model = MoEDecoder(ModelConfig(**(shape | changes)), vocab_size=30)
    hook = ExpertBiasHook(ExpertBiasConfig(rule=rule, rate=0.01, clamp=clamp))  # type: ignore[arg-type]
    hook.on_start(run_of(model))
    return hook, model


def run_of(model: nn.Module) -> RunContext:
    return RunContext(
        model=model, total_steps=9, global_batch_size=4, domain_names=("a",), domain_shares=(1.0,), run_dir=Path(),
        seed=0, device=torch.device("cpu"), samples_per_row=1, has_weights=False,
        is_frozen=False, excerpts=lambda samples: [""] * len(samples),
    )  # fmt: skip


def step_of(records: Records) -> StepContext:
    zeros = torch.zeros(4, dtype=torch.int64)
    return StepContext(
        step=1, applied_steps=0, sample_ids_B=zeros, parts_B=zeros, domains_B=zeros, tokens_B=zeros,
        losses_B=zeros.float(), own_S=zeros, recorder=records,
    )  # fmt: skip


def forward(model: MoEDecoder, seed: int = 1) -> None:
    tokens_BT = torch.randint(0, 30, (4, 9), generator=torch.Generator().manual_seed(seed))
    model(tokens_BT, tokens_BT)


def biases(model: MoEDecoder) -> torch.Tensor:
    return torch.stack([layer.router.expert_bias_E for layer in model.moe_layers()])


def test_applied_step_moves_every_layer_by_its_own_loads() -> None:
    hook, model = started()
    forward(model)
    counts = model.take_counts("train")
    forward(model)  # the same tokens again: the counts the hook will see
    hook.after_step(step_of(Records()), APPLIED)
    expected = torch.stack([0.01 * (c.double().mean() - c).sign().float() for c in counts])
    assert torch.equal(biases(model), expected)
    assert expected.any()


@pytest.mark.parametrize("result", [APPLIED, SKIPPED])
def test_loads_sent_before_the_last_backward_are_those_of_the_step(result: StepResult) -> None:
    moved = []
    for early in (False, True):
        hook, model = started()
        forward(model, seed=1)
        if early:
            hook.before_last_backward(step_of(Records()))
            assert not any(counts_E.any() for counts_E in model.take_counts("train")), "they are on their way"
        hook.after_step(step_of(Records()), result)
        forward(model, seed=2)
        hook.after_step(step_of(Records()), APPLIED)
        moved.append(biases(model))
    assert torch.equal(*moved)
    assert moved[0].any()


def test_skipped_step_moves_nothing_and_forgets_its_loads() -> None:
    hook, model = started()
    forward(model, seed=1)
    hook.after_step(step_of(Records()), SKIPPED)
    assert not biases(model).any()
    forward(model, seed=2)
    expected_counts = [c.clone() for c in [s.counts_E for s in model._stats["train"]]]
    hook.after_step(step_of(Records()), APPLIED)
    expected = torch.stack([0.01 * (c.double().mean() - c).sign().float() for c in expected_counts])
    assert torch.equal(biases(model), expected), "only the second step's loads count"


def test_rule_none_measures_without_moving_or_owning() -> None:
    hook, model = started(rule="none")
    records = Records()
    forward(model)
    hook.after_step(step_of(records), APPLIED)
    assert not biases(model).any()
    assert records.values["moe/maxvio_batch"] > 0
    assert not hook.owns
    assert started()[0].owns == {"expert_bias"}


def test_clamp_limits_the_bias() -> None:
    hook, model = started(clamp=0.025)
    for seed in range(6):
        forward(model, seed)
        hook.after_step(step_of(Records()), APPLIED)
    assert biases(model).abs().max() == pytest.approx(0.025)


def test_metrics_have_the_shared_names() -> None:
    hook, model = started()
    records = Records()
    forward(model)
    hook.after_step(step_of(records), APPLIED)
    assert set(records.values) == {
        "moe/maxvio_batch", "moe/layer0/maxvio", "moe/layer1/maxvio", "moe/load_entropy", "moe/dead_experts",
        "moe/bias_absmax", "moe/bias_mean", "moe/dropped_share",
    }  # fmt: skip
    layers = [float(records.values[f"moe/layer{i}/maxvio"]) for i in (0, 1)]
    assert float(records.values["moe/maxvio_batch"]) == pytest.approx(sum(layers) / 2)


def test_evaluation_uses_evaluation_loads() -> None:
    hook, model = started()
    forward(model, seed=1)  # training loads must not leak into the evaluation
    model.eval()
    forward(model, seed=2)
    expected = [(c.max() - c.double().mean()) / c.double().mean() for c in [s.counts_E for s in model._stats["eval"]]]
    records = Records()
    hook.on_evaluate(EvaluationContext(step=1, tokens=36, recorder=records))
    assert float(records.values["eval/maxvio_global"]) == pytest.approx(float(torch.stack(expected).mean()))


def test_state_comes_back_exactly() -> None:
    hook, model = started()
    for seed in range(3):
        forward(model, seed)
        hook.after_step(step_of(Records()), APPLIED)
    state = hook.state_dict()
    other, other_model = started()
    assert HookList({"b": other}).digest() != HookList({"b": hook}).digest()
    other.load_state_dict(state)
    assert torch.equal(biases(other_model), biases(model))
    assert HookList({"b": other}).digest() == HookList({"b": hook}).digest()


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "dense"])
def test_a_model_without_experts_is_refused(model: Any) -> None:
    if model == "dense":
        config = ModelConfig(hidden_size=32, num_layers=2, num_dense_layers=2, num_heads=4, num_kv_heads=4)
        model = MoEDecoder(config, vocab_size=9)
    with pytest.raises(ConfigError, match="no MoE layer to balance"):
        ExpertBiasHook(ExpertBiasConfig()).on_start(run_of(model))


@pytest.mark.parametrize(("rule", "said"), [("quantile", 1), ("bip", 1), ("sign", 0), ("none", 0)])
def test_a_rate_that_is_not_read_is_said(rule: str, said: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="evenkeel"):
        started(rule=rule)
    assert [f"rule {rule} has no rate; 0.01 is not read" in line for line in caplog.messages] == [True] * said


def test_rate_schedules() -> None:
    def factors(**options: Any) -> list[float]:
        return [round(rate_factor(RateSchedule(**options), n, 10), 3) for n in range(10)]

    assert factors() == [1.0] * 10
    assert factors(zero_last=0.3) == [1.0] * 7 + [0.0] * 3
    assert factors(freeze_after=2) == [1.0] * 2 + [0.0] * 8
    cosine = factors(shape="cosine")
    assert cosine[0] == 1.0
    assert cosine[5] == 0.5
    assert cosine == sorted(cosine, reverse=True)


def test_a_frozen_bias_stays_and_is_still_measured() -> None:
    model = started()[1]
    hook = ExpertBiasHook(ExpertBiasConfig(rate=0.01, schedule=RateSchedule(freeze_after=1)))
    hook.on_start(run_of(model))
    forward(model, 1)
    hook.after_step(step_of(Records()), APPLIED)
    before = biases(model)
    records, later = Records(), step_of(Records())
    later.applied_steps, later.recorder = 1, records
    forward(model, 2)
    hook.after_step(later, APPLIED)
    assert before.any()
    assert torch.equal(biases(model), before)
    assert "moe/maxvio_batch" in records.values


@pytest.mark.parametrize("additive", ["sign", "none"])
def test_additive_and_multiplicative_states_do_not_mix(additive: str) -> None:
    hook, model = started(rule="multiplicative")
    other, other_model = started(rule=additive)
    with pytest.raises(ConfigError, match=f"was balanced by {additive}, not multiplicative"):
        hook.load_state_dict(other.state_dict())
    assert (biases(model) == 1).all()
    with pytest.raises(ConfigError, match=f"was balanced by multiplicative, not {additive}"):
        other.load_state_dict(hook.state_dict())
    assert not biases(other_model).any()


@pytest.mark.parametrize("rule", ["decay_linear", "pid"])
def test_another_rule_takes_over_the_biases_and_begins_to_count(rule: str) -> None:
    hook, model = started(rule="sign")
    for seed in range(30):
        forward(model, seed)
        hook.after_step(step_of(Records()), APPLIED)
    after_switch, fresh = started(rule=rule), started(rule=rule)
    after_switch[0].load_state_dict(hook.state_dict())
    assert after_switch[0].state_dict()["updates"] == 0
    moves = []
    for each, its_model in (after_switch, fresh):
        for layer, other in zip(its_model.moe_layers(), model.moe_layers(), strict=True):
            layer.router.expert_bias_E.copy_(other.router.expert_bias_E)
        forward(its_model, 31)
        each.after_step(step_of(Records()), APPLIED)
        moves.append(biases(its_model) - biases(model))
    assert torch.equal(*moves), "as from its first update, and from where the biases are"
    assert 0 < moves[0].abs().max() < 0.1


def test_state_of_a_rule_with_memory_comes_back() -> None:
    hook, model = started(rule="smebu")
    for seed in range(3):
        forward(model, seed)
        hook.after_step(step_of(Records()), APPLIED)
    other, other_model = started(rule="smebu")
    other.load_state_dict(hook.state_dict())
    for each, its_model in ((hook, model), (other, other_model)):
        forward(its_model, 7)
        each.after_step(step_of(Records()), APPLIED)
    assert torch.equal(biases(other_model), biases(model))
