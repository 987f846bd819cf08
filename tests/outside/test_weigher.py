"""SampleWeigher: the weights of a step as factors of its losses, wherever the samples are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reweighting.outside import SampleWeigher, sample_losses
from reweighting.reference import ReferenceConfig
from reweighting.strategies import STRATEGIES
from reweighting.temperature import TemperatureConfig
from tests.harness import ROOT, run
from trainer.errors import ConfigError

LOSSES = torch.tensor([1.0, 2.0, 3.0, 4.5, 0.0])
TOKENS = torch.tensor([10, 20, 5, 1, 0])


def test_losses_are_means_over_targets() -> None:
    logits_bTV, labels_bT = torch.randn(3, 6, 11), torch.randint(0, 11, (3, 6))
    labels_bT[0, 4:] = labels_bT[2] = -100
    losses_b, tokens_b = sample_losses(logits_bTV, labels_bT)
    assert tokens_b.tolist() == [3, 5, 0]
    torch.testing.assert_close(losses_b[0], F.cross_entropy(logits_bTV[0, :3], labels_bT[0, 1:4]))
    assert losses_b[2] == 0
    same_b, _ = sample_losses(logits_bTV[:, :-1], labels_bT[:, 1:], shifted=True)
    assert torch.equal(same_b, losses_b)


def test_uniform_weights_are_the_usual_means() -> None:
    factors_S = SampleWeigher(strategy="uniform").weigh(LOSSES, TOKENS)
    torch.testing.assert_close(factors_S, TOKENS / TOKENS.sum())
    factors_S = SampleWeigher(strategy="uniform", normalization="samples").weigh(LOSSES, TOKENS)
    torch.testing.assert_close(factors_S, (TOKENS > 0) / 4)


def test_the_weights_are_those_of_the_paper() -> None:
    factors_S = SampleWeigher(temperature=0.5, normalization="samples").weigh(LOSSES, TOKENS)
    h = (2 * LOSSES[:4] - 1.0 - 4.5) / 3.5
    torch.testing.assert_close(factors_S[:4], ((h + 1).clamp(max=1) / 0.5).softmax(dim=0))
    assert factors_S[4] == 0


@given(st.integers(1, 12), st.sampled_from(sorted(STRATEGIES)), st.randoms(use_true_random=False))
def test_factors_sum_to_one_and_know_no_order(size: int, strategy: str, random: Any) -> None:
    losses_S = torch.tensor([random.uniform(0, 9) for _ in range(size)])
    tokens_S = torch.tensor([random.randint(0, 5) for _ in range(size)])
    order = torch.tensor(random.sample(range(size), size))

    def factors(losses: Tensor, tokens: Tensor) -> Tensor:
        return SampleWeigher(strategy=strategy, temperature=0.7).weigh(losses, tokens)

    factors_S = factors(losses_S, tokens_S)
    assert float(factors_S.sum()) == pytest.approx(float(tokens_S.any()), abs=1e-6)
    torch.testing.assert_close(factors(losses_S[order], tokens_S[order]), factors_S[order])


def test_a_skipped_step_leaves_no_trace_and_state_goes_through_json() -> None:
    settings: dict[str, Any] = {
        "temperature": TemperatureConfig(value=0.5, warmup_steps=2),
        "reference": ReferenceConfig(kind="running"),
    }
    one, other = SampleWeigher(**settings), SampleWeigher(**settings)
    for step in range(4):
        one.weigh(LOSSES + step, TOKENS)
        one.step(applied=True)
        other.weigh(LOSSES * 7, TOKENS)
        other.step(applied=False)
        other.weigh(LOSSES + step, TOKENS)
        other.step(applied=True)
    plain = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in other.state_dict().items()}
    restored = SampleWeigher(**settings)
    restored.load_state_dict(json.loads(json.dumps(plain)))
    expected = one.weigh(LOSSES, TOKENS)
    assert torch.equal(other.weigh(LOSSES, TOKENS), expected)
    assert torch.equal(restored.weigh(LOSSES, TOKENS), expected)
    assert one.metrics["reweight/temperature"] == 0.5


@pytest.mark.slow
def test_ranks_may_have_different_numbers_of_samples(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(
        "import torch, torch.distributed as dist\n"
        "from reweighting.outside import SampleWeigher\n"
        "from tests.outside.test_weigher import LOSSES, TOKENS\n"
        "dist.init_process_group('gloo')\n"
        "own = slice(0, 4) if dist.get_rank() == 0 else slice(4, 5)\n"
        "factors = SampleWeigher(temperature=0.5).weigh(LOSSES[own], TOKENS[own] + 1) / 2\n"
        "print('RANK', dist.get_rank(), factors.tolist(), flush=True)\n"
    )
    done = run("ranks", ranks=2, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = sorted(line.split(" ", 2) for line in done.stdout.splitlines() if line.startswith("RANK"))
    factors = [factor for line in lines for factor in json.loads(line[2])]
    expected = SampleWeigher(temperature=0.5).weigh(LOSSES, TOKENS + 1)
    torch.testing.assert_close(torch.tensor(factors), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "linuper"}, "did you mean 'linupper'"),
        ({"temperature": 0.0}, "temperature.value: 0.0 must be finite and positive"),
        ({"normalization": "rows"}, "normalization: rows must be tokens or samples"),
        ({"weigh": "documents"}, "weigh is for the project's own loop"),
        ({"capp": 2.0}, "capp"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SampleWeigher(**settings)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_temperature_that_moves_over_the_run_needs_its_length(shape: Any) -> None:
    moving = TemperatureConfig(value=100.0, final=0.5, shape=shape)
    weigher = SampleWeigher(temperature=moving)
    with pytest.raises(ConfigError, match="total_steps: a temperature that moves over the run needs its length"):
        weigher.weigh(LOSSES, TOKENS)
    weigher.start(total_steps=3)  # as the Trainer does
    seen = []
    for _ in range(3):
        weigher.weigh(LOSSES, TOKENS)
        weigher.step(applied=True)
        seen.append(weigher.metrics["reweight/temperature"])
    assert seen == pytest.approx([100.0, 50.25, 0.5])
    SampleWeigher(temperature=moving, total_steps=3).weigh(LOSSES, TOKENS)
    steady = TemperatureConfig(shape="piecewise", points={0: 2.0, 100: 0.5})
    SampleWeigher(temperature=steady).weigh(LOSSES, TOKENS)


def test_misuse_is_refused() -> None:
    weigher = SampleWeigher()
    with pytest.raises(ConfigError, match="step without weigh"):
        weigher.step(applied=True)
    with pytest.raises(ConfigError, match="need one each"):
        weigher.weigh(LOSSES, TOKENS[:2])
    weigher.weigh(LOSSES, TOKENS)
    with pytest.raises(ConfigError, match="called twice for one step"):
        weigher.weigh(LOSSES, TOKENS)
    weigher.start(total_steps=9)
    weigher.weigh(LOSSES, TOKENS)
