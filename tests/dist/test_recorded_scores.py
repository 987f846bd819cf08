"""On the same recorded scores: the same loads and biases, to the last bit, for every rule in every cut."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moe.router import threshold_histogram
from moe.rules import RULES, Loads, RuleOptions, apply_rule
from tests.dist.replay import EXPERTS, STEPS, TOP_K, Case, labels, recorded_logits
from tests.harness import run

Cut = tuple[int, Case]

TABLE: list[Cut] = [
    (ranks, Case(rule, expert_ranks, recompute, accumulation))
    for rule in RULES
    for ranks, expert_ranks in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2))
    for recompute in (False, True)
    for accumulation in (1, 4)
]
FAST = [(2, Case(rule, 2, True, 4)) for rule in RULES]
SLOW = [cut for cut in TABLE if cut not in FAST]


def expected(rule_name: str) -> dict[str, Tensor]:
    """Loads and biases written out plainly: one process, the whole batch, no model."""
    rule, kept_SN = RULES[rule_name], (labels() != -100).flatten(1)
    found = {}
    for i, logits in enumerate(recorded_logits()):
        experts = EXPERTS[i]
        bias_E = torch.full((experts,), 1.0 if rule.multiplicative else 0.0)
        state = {name: torch.zeros(experts) for name in rule.state}
        for step in range(STEPS):
            scores_NE = logits[step].flatten(0, 1).sigmoid()[kept_SN[step]]
            biased_NE = scores_NE * bias_E if rule.multiplicative else scores_NE + bias_E
            counts_E = torch.bincount(biased_NE.topk(TOP_K).indices.flatten(), minlength=experts)
            low, high = bias_E.min() - 1, bias_E.max() + 1
            everyone = torch.ones(len(scores_NE), dtype=torch.bool)
            histogram = threshold_histogram(scores_NE, bias_E, everyone, top_k=TOP_K, low=low, high=high, least_alpha=rule.least_alpha)
            loads = Loads(counts_E, histogram if rule.needs_thresholds else None, low, high, TOP_K / experts)
            bias_E, state = apply_rule(rule, loads, bias_E, state, n=step + 1, rate=0.01, options=RuleOptions())
            found |= {f"counts.{step}.{i}": counts_E, f"bias.{step}.{i}": bias_E}
    return found


def replay_all(folder: Path, cuts: list[Cut]) -> Path:
    for ranks in sorted({number for number, _ in cuts}):
        (folder / str(ranks)).mkdir()
        cases = json.dumps([case for number, case in cuts if number == ranks])
        done = run("tests.dist.replay", cases, str(folder / str(ranks)), ranks=ranks, timeout=1800)
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return replay_all(tmp_path_factory.mktemp("replay"), FAST)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return replay_all(tmp_path_factory.mktemp("replay"), SLOW)


def check(cut: Cut, folder: Path) -> None:
    ranks, case = cut
    found, wanted = load_file(folder / str(ranks) / f"{case.name}.safetensors"), expected(case.rule)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key
    last = [wanted[f"bias.{STEPS - 1}.{i}"] for i in range(len(EXPERTS))]
    assert all(bias_E.unique().numel() > 2 for bias_E in last), "biases that say something"


@pytest.mark.parametrize("cut", FAST, ids=lambda cut: f"{cut[0]}-{cut[1].name}")
def test_loads_and_biases_are_exact(cut: Cut, fast: Path) -> None:
    check(cut, fast)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cut", SLOW, ids=lambda cut: f"{cut[0]}-{cut[1].name}")
def test_loads_and_biases_are_exact_whole_table(cut: Cut, slow: Path) -> None:
    check(cut, slow)
