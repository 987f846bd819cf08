"""Weights are of the whole step: gradients and trajectories equal the plain reference, however weights come about."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from configs.loader import load_run_config
from launch._corpus import open_corpus
from tests.dist.reference import train_reference
from tests.dist.seams import SEAMS
from tests.harness import deterministic, losses, rows, run, run_trainings, tiny_config, write_corpus_source
from trainer.data.config import DataConfig
from trainer.data.corpus import TokenCorpus
from trainer.data.prepare import prepare

REWEIGHT = "hooks.sample_reweight"
DOCUMENTS = ["model.document_mask=true", "data.packing=best_fit", f"{REWEIGHT}.weigh=documents"]
TOKENS = ["hooks.token_reweight.strategy=focal", "hooks.token_reweight.gamma=2.0"]
DOMAINS = [f"hooks.domain_reweight.weights.{d}={w}" for d, w in (("code", 3.0), ("prose", 1.0), ("table", 2.0))]
DOREMI = ["hooks.domain_reweight.rule=doremi"] + [
    f"hooks.domain_reweight.reference_losses.{d}={loss}" for d, loss in (("code", 5.0), ("prose", 5.4), ("table", 4.0))
]
LINEAR = [f"{REWEIGHT}.strategy=linear"]
BY_SAMPLE = ["train.loss_normalization=samples"]

METHODS: dict[str, list[str]] = {
    "linupper": [],
    "quadratic by samples": [f"{REWEIGHT}.strategy=quadratic", *BY_SAMPLE],
    "extremes between quantiles": [
        f"{REWEIGHT}.strategy=extremes", f"{REWEIGHT}.reference.kind=quantile", f"{REWEIGHT}.reference.quantile=0.2",
    ],
    "documents": DOCUMENTS,
    "documents by samples": [*DOCUMENTS, *BY_SAMPLE],
    "token weights": TOKENS,
    "domain weights": DOMAINS,
    "documents, tokens and DoReMi": [*DOCUMENTS, *TOKENS, *DOREMI],
    "only tokens, satimp": ["hooks.token_reweight.strategy=satimp", f"{REWEIGHT}.enabled=false"],
    "only domains": [*DOMAINS, f"{REWEIGHT}.enabled=false"],
    "linear": LINEAR,
    "loads by weight": ["hooks.expert_bias.count=weight", f"{REWEIGHT}.temperature.value=0.2"],
}  # fmt: skip
CUTS: dict[str, tuple[int, list[str]]] = {
    "1x4": (1, ["train.micro_batch_size=2"]),
    "1x4 two passes": (1, ["train.micro_batch_size=2", "train.accumulation=two_pass"]),
    "1x4 recomputed": (1, ["train.micro_batch_size=2", "model.activation_recompute=block"]),
    "2x2": (2, ["train.micro_batch_size=2", "engine.zero_stage=1"]),
    "2x4 two passes": (
        2, ["train.micro_batch_size=1", "engine.zero_stage=2", "train.accumulation=two_pass"]
    ),
    "2x2 experts over 2": (
        2, ["train.micro_batch_size=2", "engine.zero_stage=2", "engine.expert_parallel_size=2",
            "train.accumulation=deferred", "model.activation_recompute=block"],
    ),
    "1x4 frozen": (1, ["train.micro_batch_size=2", "train.accumulation=frozen"]),
    "2x2 frozen": (2, ["train.micro_batch_size=2", "train.accumulation=frozen", "engine.zero_stage=1"]),
    "2x4 frozen, experts over 2": (
        2, ["train.micro_batch_size=1", "train.accumulation=frozen", "engine.zero_stage=2",
            "engine.expert_parallel_size=2"],
    ),
    "2x2 rows over 2": (2, ["train.micro_batch_size=4", "engine={zero_stage: 1, sequence_parallel_size: 2}"]),
    "2x2 frozen, rows and experts over 2, offloaded": (
        2, ["train.micro_batch_size=4", "train.accumulation=frozen",
            "engine={zero_stage: 2, sequence_parallel_size: 2, expert_parallel_size: 2, offload_optimizer: true}"],
    ),
    "4x1": (4, ["train.micro_batch_size=2", "engine.zero_stage=2"]),
}  # fmt: skip
FROZEN = [cut for cut in CUTS if "frozen" in cut]
# Frozen weights are exact for `linear`, whose slope is known; for the others they are an approximation by design.
ALL = [(m, c) for m in METHODS for c in CUTS if c not in FROZEN or m == "linear"]
# Cuts that differ in kind, each method in one or two of them.
FAST = [
    ("linupper", "1x4"), ("quadratic by samples", "2x2"), ("extremes between quantiles", "1x4 two passes"),
    ("documents", "2x2 experts over 2"), ("documents by samples", "1x4 recomputed"), ("token weights", "2x4 two passes"),
    ("domain weights", "2x2"), ("documents, tokens and DoReMi", "2x2 rows over 2"), ("only tokens, satimp", "1x4"),
    ("only domains", "2x2"), ("linear", "1x4"),
    ("loads by weight", "2x2 rows over 2"), ("loads by weight", "1x4 two passes"), *[("linear", cut) for cut in FROZEN],
]  # fmt: skip
SLOW = [case for case in ALL if case not in FAST]
# frozen + DoReMi + tokens + documents: everything that rescales, at once, by the one scalar at the end.
FROZEN_WITH_ALL = [*LINEAR, *DOCUMENTS, *TOKENS, *DOREMI]


def slug(method: str, cut: str) -> str:
    return f"{method}-{cut}".replace(" ", "_").replace(",", "")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On documents so short that several share a row of 32 tokens."""
    folder = tmp_path_factory.mktemp("reweighting")
    documents = [json.loads(line) for line in write_corpus_source(folder / "long.jsonl").read_text().splitlines()]
    with (folder / "short.jsonl").open("w") as file:
        for document in documents[::3]:
            text = document["text"]
            for start in range(0, len(text) - 120, 300):
                piece = text[start : start + 15 + (start * 7) % 90]
                file.write(json.dumps({"text": piece, "domain": document["domain"]}) + "\n")
    data_config = DataConfig(
        path=str(folder / "prepared"), source=str(folder / "short.jsonl"), vocab_size=320, heldout_fraction=0.1
    )
    prepare(data_config)
    return tiny_config(
        folder, data_config,
        # Scores and losses far apart: fewer tokens whose experts, and fewer weights whose scale, hang on rounding.
        model={"init_std": 0.1}, train={"steps": 10}, checkpoint={"every": 0}, evaluation={"every": 0, "max_rows": 1},
        optimizer={"eps": 1e-6},  # with a smaller one Adam blows rounding up to a step where gradients vanish
    )  # fmt: skip


def train_all(base: Path, cases: list[tuple[str, str]]) -> Path:
    for ranks in (1, 2, 4):
        plan = [
            (base, [*METHODS[m], *CUTS[c][1], f"run_dir={base.parent / slug(m, c)}"])
            for m, c in cases
            if CUTS[c][0] == ranks
        ]
        if plan:
            run_trainings(plan, ranks=ranks, timeout=900)
    return base.parent


Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def reference_of(base: Path) -> Callable[[str], tuple[list[float], Weights]]:
    found: dict[str, tuple[list[float], Weights]] = {}

    def reference(method: str) -> tuple[list[float], Weights]:
        if method not in found:
            config = load_run_config(base, METHODS[method])
            reference_losses, model, _ = train_reference(config, open_corpus(config))
            found[method] = reference_losses, model.state_dict()
        return found[method]

    return reference


def check(run_dir: Path, expected: tuple[list[float], Weights]) -> None:
    assert losses(run_dir) == pytest.approx(expected[0], rel=1e-5)
    weights = weights_of(run_dir)
    for key, tensor in expected[1].items():
        if not key.endswith("expert_bias_E"):  # tests/dist/test_exactness.py
            assert (weights[key] - tensor).norm() <= 1e-4 * tensor.norm(), key


def weights_of(run_dir: Path) -> Weights:
    (checkpoint,) = (run_dir / "checkpoints").glob("step-*")
    return safetensors.torch.load_file(checkpoint / "model.safetensors")


@pytest.fixture(scope="module")
def fast_runs(base: Path) -> Path:
    return train_all(base, FAST)


@pytest.fixture(scope="module")
def slow_runs(base: Path) -> Path:
    return train_all(base, SLOW)


@pytest.mark.parametrize(("method", "cut"), FAST)
def test_equals_the_reference(method: str, cut: str, fast_runs: Path, reference_of: Callable) -> None:
    check(fast_runs / slug(method, cut), reference_of(method))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "cut"), SLOW)
def test_equals_the_reference_whole_matrix(method: str, cut: str, slow_runs: Path, reference_of: Callable) -> None:
    check(slow_runs / slug(method, cut), reference_of(method))


def test_the_methods_differ(reference_of: Callable) -> None:
    finals = {method: reference_of(method)[0][-1] for method in METHODS}
    assert len({round(final, 6) for final in finals.values()}) == len(METHODS), finals


def test_frozen_steps_were_frozen_and_exact(fast_runs: Path) -> None:
    for cut in FROZEN:
        training = [row for row in rows(fast_runs / slug("linear", cut)) if "loss" in row]
        assert [row["reweight/frozen"] for row in training] == [0] + [1] * 9, "the first step has no past"
        assert all(row["reweight/audit_kl"] <= 1e-6 for row in training[1:])
        expected = [row for row in rows(fast_runs / slug("linear", "1x4")) if "loss" in row]
        for row, other in zip(training, expected, strict=True):
            assert row["loss/weighted"] == pytest.approx(other["loss/weighted"], rel=1e-4)
            assert row["reweight/ess"] == pytest.approx(other["reweight/ess"], rel=1e-3)


def test_gradients_equal_those_of_the_full_batch(base: Path, tmp_path: Path) -> None:
    """To 1e-6 relative in fp32, before any optimizer can hide or blow up a difference."""
    cases = {
        1: [("linupper", cut) for cut in ("1x4", "1x4 two passes", "1x4 recomputed")]
        + [("documents, tokens and DoReMi", "1x4"), ("linear", "1x4 frozen")],
        2: [("linupper", cut) for cut in ("2x2", "2x4 two passes", "2x2 experts over 2")]
        + [("documents, tokens and DoReMi", cut) for cut in ("2x2", "2x2 rows over 2")]
        + [("linear", cut) for cut in FROZEN if cut.startswith("2x")],
    }
    for ranks, chosen in cases.items():
        # No warm-up, so that the first step has weights that matter.
        plan = [[str(base), [*METHODS[m], *CUTS[c][1], f"{REWEIGHT}.temperature.warmup_steps=0"]] for m, c in chosen]
        out = tmp_path / f"errors-{ranks}.json"
        done = run("tests.dist.gradients", json.dumps(plan), str(out), ranks=ranks)
        assert done.returncode == 0, done.stderr[-4000:]
        for case, error in zip(chosen, json.loads(out.read_text()), strict=True):
            assert error <= 1e-6, (case, error)


@pytest.mark.fault(17, "all samples of a rank masked, or of unequal length")
@pytest.mark.parametrize("seam", ["masked_samples", "uneven_samples"])
def test_masked_rows_and_unequal_lengths(
    seam: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `masked_samples` all samples of rank 1 are masked in every step: it adds nothing, and nothing is NaN."""
    plan = [
        (base, [*METHODS[m], *CUTS["2x2"][1], "train.steps=5", f"run_dir={tmp_path / str(i)}"])
        for i, m in enumerate(("linupper", "quadratic by samples"))
    ]
    run_trainings(plan, ranks=2, seam=seam)
    monkeypatch.setattr(TokenCorpus, "train_batch", TokenCorpus.train_batch)  # put back what the seam replaces
    SEAMS[seam]()
    for i, method in enumerate(("linupper", "quadratic by samples")):
        config = load_run_config(base, [*METHODS[method], "train.steps=5"])
        reference_losses, model, _ = train_reference(config, open_corpus(config))
        check(tmp_path / str(i), (reference_losses, model.state_dict()))


def test_any_number_of_kept_graphs_gives_the_same_bits(base: Path, tmp_path: Path) -> None:
    """With dropout, whose masks are drawn again from the replayed state: all kept, three, one, none."""
    common = ["train.micro_batch_size=1", "model.dropout=0.1", "train.steps=5", "model.router_jitter=0.05"]

    def train(name: str, mode: str, seam: str = "") -> Path:
        folder = tmp_path / name
        run_trainings([(base, [*common, f"train.accumulation={mode}", f"run_dir={folder}"])], ranks=1, seam=seam)
        return folder

    expected = train("deferred", "deferred")
    for name, mode, seam, kept in (
        ("none", "two_pass", "", None),
        ("one", "auto", "no_free_memory", 1),
        ("three", "auto", "memory_for_two_more", 3),
        ("all", "auto", "", 8),
    ):
        found = train(name, mode, seam)
        assert deterministic(found) == deterministic(expected), name
        assert all(torch.equal(tensor, weights_of(expected)[key]) for key, tensor in weights_of(found).items()), name
        if kept is not None:
            assert f"{kept} of 8 micro-batches keep their graphs" in (found / "log.txt").read_text()


def test_running_statistics_are_exact_when_frozen_and_survive_a_restart(base: Path, tmp_path: Path) -> None:
    common = [f"{REWEIGHT}.reference.kind=running", "train.micro_batch_size=2", "engine.zero_stage=1"]
    plan = [
        (base, [*common, "train.accumulation=deferred", f"run_dir={tmp_path / 'exact'}"]),
        (base, [*common, "train.accumulation=frozen", f"run_dir={tmp_path / 'frozen'}"]),
        (base, [*common, "train.accumulation=frozen", "train.steps=10", "checkpoint.every=6",
                f"run_dir={tmp_path / 'resumed'}"]),
    ]  # fmt: skip
    run_trainings(plan, ranks=2)
    check(tmp_path / "frozen", (losses(tmp_path / "exact"), weights_of(tmp_path / "exact")))
    training = [row for row in rows(tmp_path / "frozen") if "loss" in row]
    assert all(row["reweight/audit_kl"] <= 1e-6 for row in training[1:])
    for step in (tmp_path / "resumed" / "checkpoints").glob("step-*10"):
        for file in sorted(step.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        step.rmdir()
    run_trainings([plan[2]], ranks=2, new_process=True)
    assert deterministic(tmp_path / "resumed") == deterministic(tmp_path / "frozen")


def test_an_audit_beyond_the_tolerance_falls_back_to_exact_steps(base: Path, tmp_path: Path) -> None:
    overrides = [
        f"{REWEIGHT}.frozen.tolerance=1e-5", f"{REWEIGHT}.frozen.exact_steps=2", f"{REWEIGHT}.temperature.value=0.1",
        "train.accumulation=frozen", "train.micro_batch_size=2", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    run_trainings([(base, overrides)], ranks=2)
    training = [row for row in rows(tmp_path / "run") if "loss" in row]
    frozen = [row["reweight/frozen"] for row in training]
    failed = [i for i, row in enumerate(training) if row.get("reweight/audit_kl", 0) > 1e-5]
    assert failed
    for i in failed:
        assert frozen[i + 1 : i + 3] == [0, 0][: len(frozen) - i - 1]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_frozen_scales_gradients_in_bf16_too(stage: int, base: Path, tmp_path: Path) -> None:
    """Within what bf16 can tell apart; a gradient without its divisor would be eight times as long."""
    common = [
        *LINEAR, "train.micro_batch_size=2", "engine.precision=bf16", f"engine.zero_stage={stage}", "train.steps=4",
        f"{REWEIGHT}.temperature.warmup_steps=0", "optimizer.clip_norm=0.5",
    ]  # fmt: skip
    plan = [
        (base, [*common, f"train.accumulation={mode}", f"run_dir={tmp_path / mode}"]) for mode in ("deferred", "frozen")
    ]
    run_trainings(plan, ranks=2)
    pairs = zip(*([row for row in rows(tmp_path / mode) if "loss" in row] for mode in ("deferred", "frozen")), strict=True)
    for exact, frozen in pairs:
        assert frozen["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.05)
        assert frozen["loss"] == pytest.approx(exact["loss"], rel=0.01)


def test_everything_that_rescales_at_once(base: Path, tmp_path: Path) -> None:
    plan = [
        (base, [*FROZEN_WITH_ALL, *CUTS["2x2"][1], f"train.accumulation={mode}", f"run_dir={tmp_path / mode}"])
        for mode in ("deferred", "frozen")
    ]
    run_trainings(plan, ranks=2)
    check(tmp_path / "frozen", (losses(tmp_path / "deferred"), weights_of(tmp_path / "deferred")))
