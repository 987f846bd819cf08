"""Every family of transformers with a selection bias: its routers are found, counted rightly and really balanced."""

import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.outside import BiasBalancer
from tests.outside.conftest import PAGE
from tests.outside.families import REFUSED, block_of, families, output_of, table, tiny_model
from trainer.errors import ConfigError

STEPS = 25

# One for each place a bias can be in; all of them run with the slow tests.
QUICK = ("glm4_moe", "ernie4_5_moe", "minimax_m2")
ALL = [
    pytest.param(family, marks=() if family in QUICK else pytest.mark.slow)
    for family in families()
    if family not in REFUSED
]


class _Seen:
    """What each layer's experts were told to work on, by the router's name: counted where the work is done."""

    def __init__(self, model: nn.Module, balancer: BiasBalancer) -> None:
        self.chosen: dict[str, Tensor] = {}
        for name in balancer.biases:
            block_of(model, name).register_forward_pre_hook(self._hook(name), with_kwargs=True)

    def _hook(self, name: str) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.chosen[name] = inspect.signature(module.forward).bind(*args, **kwargs).arguments["top_k_index"].clone()

        return see


def uneven(family: str) -> nn.Module:
    """A model whose hidden states have a common direction, as trained ones have: a few experts get nearly all."""
    model = tiny_model(family).train()
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings += 0.05 * torch.randn(embeddings.shape[1])
    return model


def train(family: str, rule: Any) -> list[float]:
    """MaxVio of each step; every count is compared with what the experts saw."""
    model = uneven(family)
    balancer = BiasBalancer(model, rule=rule)
    seen = _Seen(model, balancer)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    violations = []
    for step in range(STEPS):
        balancer.rate = 0.03 * 0.88**step  # scores of tokens lie closer together in some families than in others
        ids_BT = torch.randint(3, 60, (4, 32), generator=generator)
        output_of(model, ids_BT).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        loads = balancer.step(applied=True)
        violations.append(float(loads.max_violation))
        for name, counts_E in loads.counts.items():
            chosen = seen.chosen.get(name, torch.empty(0, dtype=torch.int64))
            assert torch.equal(chosen.flatten().bincount(minlength=len(counts_E))[: len(counts_E)], counts_E)
        assert sum(int(counts_E.sum()) for counts_E in loads.counts.values()) > 0
    return violations


@pytest.mark.parametrize("family", ALL)
def test_the_bias_decides_and_balances(family: str) -> None:
    model = uneven(family)
    balancer = BiasBalancer(model)
    seen = _Seen(model, balancer)
    for bias_E in balancer.biases.values():
        bias_E[3] = 100.0
    output_of(model, torch.randint(3, 60, (2, 16)))
    assert seen.chosen
    for chosen_NK in seen.chosen.values():
        assert len(chosen_NK) == 0 or (chosen_NK == 3).any(dim=1).all()

    with_bias, without = train(family, "sign"), train(family, "none")
    assert with_bias[0] == without[0] > 1
    assert sum(with_bias[-5:]) < 0.75 * sum(without[-5:])


@pytest.mark.parametrize("family", REFUSED)
def test_refused_families_say_why(family: str) -> None:
    with pytest.raises(ConfigError, match=r"\w+Router .*not supported"):
        BiasBalancer(tiny_model(family))


def test_the_page_knows_every_family_that_is_installed() -> None:
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE) == families()


@pytest.mark.slow
def test_the_page_has_the_table_as_it_is() -> None:
    assert table() in PAGE, f"put this into moe/OTHER_LOOPS.md:\n{table()}"
