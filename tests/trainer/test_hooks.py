"""The protocol: ownership, state, registry."""

import pytest
import torch

from tests.dist.hooks import SecondOwner, Thief
from tests.moe.test_bias_hook import Records
from trainer.errors import ConfigError
from trainer.hooks import Hook, HookList, State, StepContext
from trainer.registry import find_hook, hook_names


def step_of() -> StepContext:
    ids = torch.arange(4)
    return StepContext(
        step=1,
        applied_steps=0,
        sample_ids_B=ids,
        parts_B=ids * 0,
        domains_B=ids,
        tokens_B=ids,
        losses_B=ids.float(),
        own_S=ids,
        recorder=Records(),
    )


class Owner(Hook):
    owns = frozenset({"weights"})

    def __init__(self, size: int = 4) -> None:
        self._size = size

    def on_losses(self, step: StepContext) -> None:
        step.weights_B = torch.full((self._size,), 0.25)


class Counter(Hook):
    def __init__(self, value: int = 0) -> None:
        self.value = torch.tensor(value)

    def state_dict(self) -> State:
        return {"value": self.value, "kind": "counter"}

    def load_state_dict(self, state: State) -> None:
        assert isinstance(state["value"], torch.Tensor)
        self.value = state["value"]


def test_two_owners_of_a_slot_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'weights' is already owned by hooks\.first"):
        HookList({"first": Owner(), "second": SecondOwner()})


def test_only_the_owner_may_set_weights() -> None:
    step = step_of()
    HookList({"owner": Owner()}).on_losses(step)
    assert step.weights_B is not None
    with pytest.raises(ConfigError, match="without owning it"):
        HookList({"owner": Owner(), "thief": Thief()}).on_losses(step_of())
    with pytest.raises(ConfigError, match="shape"):
        HookList({"owner": Owner(size=3)}).on_losses(step_of())


class Needy(Hook):
    needs = frozenset({"weights"})


def test_a_slot_that_a_hook_needs_must_have_an_owner() -> None:
    HookList({"needy": Needy(), "owner": Owner()})
    with pytest.raises(ConfigError, match=r"hooks\.needy: needs a hook that sets 'weights'"):
        HookList({"needy": Needy()})


def test_owning_weights_asks_for_losses_first() -> None:
    assert HookList({"owner": Owner()}).needs_batch_losses
    assert not HookList({"counter": Counter()}).needs_batch_losses


def test_digest_sees_every_bit_of_state() -> None:
    assert HookList({"a": Counter(1)}).digest() == HookList({"a": Counter(1)}).digest()
    assert HookList({"a": Counter(1)}).digest() != HookList({"a": Counter(2)}).digest()
    assert HookList({"a": Counter(1)}).digest() != HookList({"b": Counter(1)}).digest()


def test_state_of_hooks_that_come_and_go_is_told() -> None:
    states = HookList({"old": Counter(5), "kept": Counter(7)}).state_dict()
    kept = Counter()
    notes = HookList({"kept": kept, "new": Counter()}).load_state_dict(states)
    assert kept.value == 7
    assert notes == [
        "hooks.new is new in this run: it starts from its initial state",
        "hooks.old is saved in the checkpoint but not in this run: its state is dropped",
    ]


def test_state_of_another_version_is_refused() -> None:
    states = {"kept": (2, Counter(7).state_dict())}
    with pytest.raises(ConfigError, match="version 2, this code reads 1"):
        HookList({"kept": Counter()}).load_state_dict(states)


def test_registry_finds_names_and_paths() -> None:
    from moe.bias_hook import ExpertBiasHook

    assert {"expert_bias", "sample_reweight"} <= set(hook_names())
    assert find_hook("expert_bias") is ExpertBiasHook
    assert find_hook("moe.bias_hook:ExpertBiasHook") is find_hook("moe.bias_hook.ExpertBiasHook") is ExpertBiasHook
    with pytest.raises(ConfigError, match="did you mean 'sample_reweight'"):
        find_hook("sample_rewight")
