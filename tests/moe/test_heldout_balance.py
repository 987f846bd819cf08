"""What evaluations record: loads by domain, the sample of scores and its duality gap, alike however rows are dealt."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe import theory
from moe.bias_hook import ExpertBiasConfig, ExpertBiasHook
from moe.model import MoEDecoder
from moe.score_sample import RecordedScores, ScoreSample, load_scores, save_scores, token_keys
from tests.harness import ROOT, environment
from tests.moe.test_bias_hook import APPLIED, Records, forward, run_of, started
from tests.moe.test_certificate import step_with
from trainer.hooks import EvaluationContext

LAYERS = {"num_layers": 4, "layer_experts": (0, 8, 4, 16), "mtp_weight": 0.1}


def rows_of_text(count: int = 12, length: int = 10) -> torch.Tensor:
    return torch.randint(0, 30, (count, length), generator=torch.Generator().manual_seed(5))


def sampled(model: MoEDecoder, batches: list[torch.Tensor], size: int = 32) -> list[torch.Tensor | None]:
    sample = ScoreSample(model, [layer.router for layer in model.moe_layers()], size)
    model.eval()
    with torch.no_grad():
        for batch_BT in batches:
            model(batch_BT, batch_BT)
    return sample.take()


def evaluated(hook: ExpertBiasHook, model: MoEDecoder, domains: list[torch.Tensor]) -> dict[str, Any]:
    model.eval()
    with torch.no_grad():
        for number, rows_BT in enumerate(domains):
            if len(rows_BT):
                model(rows_BT, rows_BT)
            hook.on_evaluate_domain(number)
    model.train()
    records = Records()
    hook.on_evaluate(EvaluationContext(step=1, tokens=1, recorder=records))
    return records.values


def test_the_sample_does_not_depend_on_batches() -> None:
    _, model = started(**LAYERS)
    rows_BT = rows_of_text()
    whole = sampled(model, [rows_BT])
    pieces = sampled(model, list(rows_BT[torch.randperm(12)].split(5)))
    assert whole[-1] is None, "the next-token block does not run in evaluations"
    for one, other in zip(whole[:-1], pieces[:-1], strict=True):
        assert one is not None
        assert one.shape[0] == 32
        torch.testing.assert_close(one, other)
    assert not torch.allclose(whole[0][:16], whole[0][16:]), "tokens differ"  # type: ignore[index]


def test_memory_is_that_of_the_text_however_much_is_asked_for() -> None:
    _, model = started(**LAYERS)
    everything = sampled(model, [rows_of_text()], size=10**15)
    assert everything[0] is not None
    assert everything[0].shape == (120, 8)


def test_a_small_text_is_taken_whole_and_padding_never() -> None:
    hook, model = started()
    rows_BT = rows_of_text(3, 6)
    labels_BT = rows_BT.clone()
    labels_BT[:, 4:] = -100
    assert (token_keys(rows_BT, labels_BT >= 0)[:, 4:] == torch.iinfo(torch.int64).max).all()
    assert token_keys(rows_BT, labels_BT >= 0)[:, :4].unique().numel() == 12
    assert hook._sample is not None
    model.eval()
    model(rows_BT, labels_BT)
    first = hook._sample.take()[0]
    assert first is not None
    assert first.shape == (12, 8)


def test_keys_are_spread_evenly() -> None:
    keys = token_keys(torch.randint(0, 9, (200, 50)), torch.ones(200, 50, dtype=torch.bool)).flatten().double()
    assert (keys >= 0).all()
    histogram = torch.histc(keys / 2**63, bins=10, min=0, max=1)
    assert histogram.min() > 800
    assert histogram.max() < 1200


def test_sampling_leaves_training_alone() -> None:
    """Random state, loads and biases are those of a run without it."""
    states = []
    for size in (0, 64):
        torch.manual_seed(0)
        _, model = started()
        hook = ExpertBiasHook(ExpertBiasConfig(rate=0.01, gap_tokens=size))
        hook.on_start(run_of(model))
        for seed in range(3):
            forward(model, seed)
            hook.after_step(step_with(36), APPLIED)
            values = evaluated(hook, model, [rows_of_text()])
            assert ("moe/duality_gap" in values) == (size > 0)
        states.append((torch.get_rng_state(), model.moe_layers()[0].router.expert_bias_E.clone()))
        assert not any(counts_E.any() for counts_E in model.take_counts("train"))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("changes", [{"num_groups": 4, "top_groups": 2}, {"uniform_routing": True}, "multiplicative"])
def test_no_gap_where_biases_are_no_prices(changes: Any) -> None:
    hook, model = started(rule="multiplicative") if changes == "multiplicative" else started(**changes)
    assert "moe/duality_gap" not in evaluated(hook, model, [rows_of_text()])


@pytest.mark.parametrize("rule", ["sign", "none"])
def test_the_gap_is_that_of_the_sample(rule: str) -> None:
    hook, model = started(rule=rule, **LAYERS)
    for layer in model.moe_layers():
        layer.router.weight.data *= 40
    for seed in range(4):
        forward(model, seed)
        hook.after_step(step_with(36), APPLIED)
    rows_BT = rows_of_text()
    values = evaluated(hook, model, [rows_BT])
    scores = sampled(model, [rows_BT], size=256)
    gaps = []
    for i, layer in enumerate(model.moe_layers()[:-1]):
        prices_E = layer.router.expert_bias_E
        assert bool(prices_E.any()) == (rule == "sign")
        assert scores[i] is not None
        whole = len(scores[i]) // 8 * 8  # type: ignore[arg-type]
        gaps.append(theory.duality_gap(scores[i][:whole].double(), prices_E.double(), 2) / whole)  # type: ignore[index]
        assert float(values[f"moe/layer{i}/duality_gap"]) == pytest.approx(gaps[-1], abs=1e-5)
    assert math.isnan(values["moe/layer3/duality_gap"]), "the next-token block does not run in evaluations"
    assert float(values["moe/duality_gap"]) == pytest.approx(sum(gaps) / len(gaps), abs=1e-5)
    assert min(gaps) > 1e-3


def test_loads_by_domain_add_up_to_those_of_the_whole() -> None:
    hook, model = started(**LAYERS)
    hook.on_start(replace(run_of(model), domain_names=("a", "empty", "b")))
    a, b = rows_of_text(5), rows_of_text(7) + 1
    values = evaluated(hook, model, [a, a[:0], b.clamp(max=29)])

    for i, experts in enumerate((8, 4, 16)):
        loads_DE, counts_E = values[f"moe/layer{i}/domain_loads"], values[f"moe/layer{i}/loads"]
        assert loads_DE.shape == (3, experts)
        assert loads_DE.sum(1).tolist() == [5 * 10 * 2, 0, 7 * 10 * 2]
        assert torch.equal(loads_DE.sum(0), counts_E)
        assert torch.allclose(values["moe/loads"][i, :experts].double(), counts_E / counts_E.double().mean())
        assert values["moe/loads"][i, experts:].isnan().all()
        assert torch.equal(values["moe/bias"][i, :experts], values[f"moe/layer{i}/bias"])
    model.eval()
    model(a, a)
    assert torch.equal(values["moe/layer0/domain_loads"][0], model.take_counts("eval")[0])


def test_recorded_scores_come_back(tmp_path: Path) -> None:
    scores = RecordedScores({0: torch.rand(5, 4), 2: torch.rand(5, 8)}, 2, "somewhere")
    save_scores(tmp_path / "new" / "scores.safetensors", scores)
    found = load_scores(tmp_path / "new" / "scores.safetensors")
    assert found[1:] == scores[1:]
    assert found.layers.keys() == scores.layers.keys()
    assert all(torch.equal(found.layers[i], scores.layers[i]) for i in scores.layers)


SCRIPT = """
import json, sys, torch, torch.distributed as dist
from dataclasses import replace
from tests.moe.test_bias_hook import run_of, started
from tests.moe.test_heldout_balance import LAYERS, evaluated, rows_of_text

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
hook, model = started(**LAYERS)
hook.on_start(replace(run_of(model), domain_names=("a", "b")))
a, b = rows_of_text(7), rows_of_text(9).flip(1)
b[3] = b[4]  # the same sequence twice
values = evaluated(hook, model, [a[rank::world], b[rank::world]])
json.dump({k: torch.as_tensor(v).tolist() for k, v in values.items()}, open(sys.argv[1] + f"/{world}-{rank}", "w"))
dist.destroy_process_group()
"""


def test_all_ranks_record_the_same_whatever_their_number(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for world in (1, 2):
        store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(21000 + os.getpid() % 20000), "WORLD_SIZE": str(world)}
        workers = [
            subprocess.Popen(
                [sys.executable, str(script), str(tmp_path)],
                env=environment(**store, RANK=str(rank)), cwd=ROOT, stderr=subprocess.PIPE,
            )
            for rank in range(world)
        ]  # fmt: skip
        for worker in workers:
            _, errors = worker.communicate(timeout=120)
            assert worker.returncode == 0, errors.decode()[-3000:]
    first, second = (tmp_path / "2-0").read_text(), (tmp_path / "2-1").read_text()
    assert first == second, "bit for bit"
    alone, together = json.loads((tmp_path / "1-0").read_text()), json.loads(first)
    assert alone.keys() == together.keys()
    for key, value in alone.items():
        if "gap" in key:
            assert together[key] == pytest.approx(value, rel=1e-4, nan_ok=True), key
        else:
            assert str(together[key]) == str(value), key
    assert together["moe/duality_gap"] > 0
