"""Learning rates and parameter groups."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainer.optim import OptimizerConfig, build_adamw
from trainer.schedule import ScheduleConfig, learning_rate


def rates(total: int = 10, **options: object) -> list[float]:
    config = ScheduleConfig(**({"warmup_steps": 2} | options))  # type: ignore[arg-type]
    return [learning_rate(config, n, peak=1.0, total_steps=total) for n in range(total)]


def test_shapes() -> None:
    assert rates(shape="constant") == [0.5, *[1.0] * 9]
    assert rates(shape="linear", final_fraction=0.2) == pytest.approx([0.5, 1.0, *[0.9 - 0.1 * n for n in range(8)]])
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * n / 8)) / 2 for n in range(1, 9)]
    assert rates(shape="cosine") == pytest.approx([0.5, 1.0, *cosine])
    assert rates(shape="wsd", decay_steps=4, final_fraction=0.0) == pytest.approx(
        [0.5, *[1.0] * 5, 0.75, 0.5, 0.25, 0.0]
    )


shapes = st.sampled_from(["cosine", "linear", "wsd", "constant"])


@given(
    shape=shapes, warmup=st.integers(0, 50), total=st.integers(51, 500), final=st.floats(0, 1), peak=st.floats(1e-6, 1)
)
def test_laws(shape: str, warmup: int, total: int, final: float, peak: float) -> None:
    config = ScheduleConfig(
        shape=shape, warmup_steps=warmup, final_fraction=final, decay_steps=(total - warmup) if shape == "wsd" else 0
    )  # type: ignore[arg-type]
    assert not config.problems()
    assert not config.step_problems(total)
    values = [learning_rate(config, n, peak=peak, total_steps=total) for n in range(total + 5)]
    assert all(0 <= value <= peak * (1 + 1e-12) for value in values)
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    assert values[0] > 0 or (warmup == 0 and final == 0)
    last = peak if shape == "constant" else peak * final
    assert values[total - 1] == pytest.approx(last, abs=1e-12)
    assert values[total + 4] == values[total - 1]


def test_every_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 5, bias=False))
    optimizer = build_adamw(model, OptimizerConfig(weight_decay=0.3), torch.device("cpu"))
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert [id(p) for p in decayed["params"]] == [id(model[1].weight), id(model[3].weight)]
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_tied_embedding_does_not_decay() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    decayed, plain = build_adamw(model, OptimizerConfig(), torch.device("cpu")).param_groups
    assert not decayed["params"]
    assert len(plain["params"]) == 1
