"""The hook of domain weights: what it asks of a configuration, how it moves, what it keeps."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from reweighting.domain_hook import DomainReweightConfig, DomainReweightHook
from reweighting.domains import doremi_update
from tests.moe.test_bias_hook import APPLIED, SKIPPED, Records
from trainer.errors import ConfigError
from trainer.hooks import HookList, PhaseContext, RunContext, StepContext


def run_of() -> RunContext:
    return RunContext(
        model=nn.Identity(), total_steps=9, global_batch_size=4, domain_names=("a", "b"), domain_shares=(0.75, 0.25),
        run_dir=Path(), device=torch.device("cpu"), seed=0, samples_per_row=1, has_weights=False,
        is_frozen=False, excerpts=lambda samples: [],
    )  # fmt: skip


def started(**options: object) -> DomainReweightHook:
    hook = DomainReweightHook(DomainReweightConfig(**options))  # type: ignore[arg-type]
    hook.on_start(run_of())
    return hook


def step_of(losses: list[float], domains: list[int], tokens: list[int], applied: int = 0) -> StepContext:
    ids_B = torch.arange(len(losses))
    return StepContext(
        step=applied + 1, applied_steps=applied, sample_ids_B=ids_B, parts_B=ids_B * 0, domains_B=torch.tensor(domains),
        tokens_B=torch.tensor(tokens), losses_B=torch.tensor(losses), own_S=ids_B, recorder=Records(),
    )  # fmt: skip


def test_fixed_weights_make_each_domain_its_share() -> None:
    hook = started(weights={"a": 1.0, "b": 1.0})
    assert hook.domain_factors().tolist() == pytest.approx([0.5 / 0.75, 0.5 / 0.25])
    hook.after_step(step_of([3.0, 5.0], [0, 1], [9, 9]), APPLIED)
    assert hook.domain_factors().tolist() == pytest.approx([0.5 / 0.75, 0.5 / 0.25])


def test_doremi_moves_by_excess_over_the_steps_since_the_last_update() -> None:
    hook = started(rule="doremi", reference_losses={"a": 3.0, "b": 3.0}, eta=0.5, smoothing=0.1, every=2)
    start = torch.full((2,), 0.5, dtype=torch.float64)
    hook.after_step(step_of([4.0, 2.0], [0, 1], [10, 10]), APPLIED)
    assert torch.equal(hook.domain_factors(), torch.tensor([0.5 / 0.75, 0.5 / 0.25], dtype=torch.float64))
    hook.after_step(step_of([7.0, 1.0], [0, 1], [10, 30], 1), SKIPPED)
    hook.after_step(step_of([6.0, 2.0], [0, 0], [10, 20], 1), APPLIED)
    excess = torch.tensor([(40 + 60 + 40) / 40 - 3.0, 0.0])
    expected = doremi_update(start, excess, eta=0.5, smoothing=0.1)
    torch.testing.assert_close(hook.domain_factors() * torch.tensor([0.75, 0.25]), expected)


def test_factors_follow_the_mixture_of_the_phase() -> None:
    hook = started(weights={"a": 1.0, "b": 1.0})
    hook.on_phase(PhaseContext(number=1, first_sample=9, domain_shares=(0.25, 0.75)))
    assert hook.domain_factors().tolist() == pytest.approx([0.5 / 0.25, 0.5 / 0.75])


def test_the_same_rule_can_move_the_sampling_instead() -> None:
    options = {"rule": "doremi", "reference_losses": {"a": 3.0, "b": 3.0}, "eta": 0.5, "smoothing": 0.1, "every": 2}
    hook, on_loss = started(**options, target="sampling", weights={"a": 3.0, "b": 1.0}), started(**options)
    assert (hook.owns, on_loss.owns) == ({"sampling"}, {"domain_factors"})
    HookList({"sampling": hook, "loss": on_loss})  # two slots
    assert hook.sampling_weights().tolist() == pytest.approx([0.75, 0.25]), "to begin with"
    assert hook.sampling_weights() is None, "nothing has changed"
    hook.after_step(step_of([4.0, 2.0], [0, 1], [10, 10]), APPLIED)
    assert hook.sampling_weights() is None
    hook.after_step(step_of([4.0, 2.0], [0, 1], [10, 10], 1), APPLIED)
    start = torch.tensor([0.75, 0.25], dtype=torch.float64)
    expected = doremi_update(start, torch.tensor([1.0, 0.0]), eta=0.5, smoothing=0.1)
    torch.testing.assert_close(hook.sampling_weights(), expected)
    resumed = started(**options, target="sampling")
    resumed.load_state_dict(hook.state_dict())
    assert resumed.sampling_weights() is None, "a resumed run has asked for it already"
    with pytest.raises(ConfigError, match="'sampling' is already owned"):
        HookList({"first": hook, "second": resumed})


def test_a_domain_that_does_not_occur_keeps_its_excess() -> None:
    hook = started(rule="doremi", reference_losses={"a": 3.0, "b": 3.0})
    hook.after_step(step_of([4.0, 5.0], [0, 1], [10, 10]), APPLIED)
    hook.after_step(step_of([4.0], [0], [10], 1), APPLIED)
    assert hook.state_dict()["excess"].tolist() == pytest.approx([1.0, 2.0])  # type: ignore[union-attr]


def test_state_is_restored_and_belongs_to_its_domains() -> None:
    options = {"rule": "doremi", "reference_losses": {"a": 3.0, "b": 3.0}, "every": 3}
    hook, other = started(**options), started(**options)
    for n in range(4):
        hook.after_step(step_of([4.0 + n, 5.0], [0, 1], [10, 10], n), APPLIED)
    other.load_state_dict(hook.state_dict())
    for each in (hook, other):
        each.after_step(step_of([4.0, 9.0], [0, 1], [10, 10], 4), APPLIED)
        each.after_step(step_of([4.0, 9.0], [0, 1], [10, 10], 5), APPLIED)
    assert torch.equal(hook.domain_factors(), other.domain_factors())
    with pytest.raises(ConfigError, match="other domains"):
        other.load_state_dict(hook.state_dict() | {"domains": "x\ny"})


def test_reference_losses_come_from_the_last_evaluation_of_a_run(tmp_path: Path) -> None:
    rows = [{"step": 0, "eval/loss": 9.0, "eval/a/ppl": 99.0}, {"step": 5, "loss": 3.0}]
    rows.append({"step": 9, "eval/loss": 2.5, "eval/a/ppl": math.exp(2.0), "eval/b/ppl": math.exp(3.0)})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hook = started(rule="doremi", reference_run=str(tmp_path))
    assert hook.state_dict()["reference"].tolist() == pytest.approx([2.0, 3.0])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"a": 1.0}}, "domain b is missing"),
        ({"weights": {"a": 1.0, "b": 1.0, "c": 1.0}}, "weights.c: no such domain; the corpus has a, b"),
        ({"rule": "doremi", "reference_losses": {"a": 1.0}}, "reference_losses: domain b is missing"),
        ({"rule": "doremi", "reference_run": "nowhere"}, "metrics.jsonl cannot be read"),
    ],
)
def test_what_does_not_fit_the_corpus_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        started(**options)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "weights: rule static needs"),
        ({"weights": {"a": 0.0}}, "weights.a: 0.0 must be finite and positive"),
        ({"rule": "doremi"}, "reference_run: rule doremi needs either"),
        ({"rule": "doremi", "reference_run": "x", "reference_losses": {"a": 1.0}}, "reference_run: rule doremi needs"),
        ({"weights": {"a": 1.0}, "target": "sampling"}, "target: fixed weights of the sampling are data.weights"),
        ({"weights": {"a": 1.0}, "eta": 2.0}, "eta: rule static does not read it"),
        ({"rule": "doremi", "reference_run": "x", "smoothing": 1.0}, "smoothing: 1.0 must be in [0, 1)"),
        ({"rule": "doremi", "reference_run": "x", "every": 0}, "every: 0 must be at least 1"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(options: dict[str, object], line: str) -> None:
    problems = DomainReweightConfig(**options).problems()  # type: ignore[arg-type]
    assert len(problems) == 1
    assert problems[0].startswith(line)
