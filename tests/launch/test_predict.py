"""Foretold steps: by hand where a hand can follow, monotone where physics is, and near what others measured."""

import re
import shlex
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.loader import load_run_config
from launch import dryrun
from launch._cli import run_command
from launch._foretell import WITHIN
from launch._hardware import GPUS, NETWORKS, Gpu, Network
from launch._layouts import USABLE, Cluster, elasticities, ranked, weigh
from launch._predict import distinct, predict
from launch._published import FITTED, PUBLISHED, fit, foretell
from launch._step_terms import Constants, Layout, Parts
from moe.config import ModelConfig
from tests.harness import ROOT

TOY = ModelConfig(
    hidden_size=64, num_layers=2, num_dense_layers=1, dense_intermediate_size=128, num_heads=4, num_kv_heads=4,
    num_experts=8, top_k=2, expert_intermediate_size=32, num_shared_experts=0,
)  # fmt: skip
TOY_GPU = Gpu("toy", peak_flops=1e12, memory_bytes=1e9, memory_bandwidth=1e12, link_bandwidth=1e11)
TOY_NETWORK = Network("toy", bandwidth=1e10, latency=0.0)
IDEAL = Constants(
    product_efficiency=1, grouped_efficiency=1, attention_efficiency=1, memory_efficiency=1, link_efficiency=1,
    network_efficiency=1, layer_seconds=0, hidden_reduction=0, hidden_alltoall=0,
)  # fmt: skip
# Four sequences of 16 tokens at a time, twice: 64 tokens a micro-batch.
ONE_GPU = Layout(gpus=1, sequence_length=16, micro_batch=4, global_batch=8, zero_stage=0)


def toy_parts(layout: Layout) -> Parts:
    return predict(TOY, 100, layout, TOY_GPU, TOY_NETWORK, IDEAL).parts


def test_one_gpu_by_hand() -> None:
    parts = toy_parts(ONE_GPU)
    # Two attentions of 64 x 16 x 16 heads, a feed-forward of 3 x 64 x 128, a router of 8 x 64, a head of 100 x 64;
    # 6 FLOPs a weight and token, 2 x 64 tokens.
    assert parts.products == pytest.approx((2 * 16384 + 24576 + 512 + 6400) * 6 * 128 / 1e12)
    # 16 rows reach each of 8 experts of 3 x 64 x 32 and fill a fifth of a tile; 3 products, twice.
    assert parts.experts == pytest.approx(2 * 6144 * 16 * 8 / 0.2 * 3 * 2 / 1e12)
    # A token sees 8 others on average, in 2 layers of 4 heads: 2 products of 2 x 16 FLOPs each, 3.5 times, 128 tokens.
    assert parts.attention == pytest.approx(2 * 4 * 2 * 8 * 32 * 3.5 * 128 / 1e12)
    # Two blocks of 14 rows and 12 heads thrice, 2 chosen experts, the dense activation; three passes; and 8 logits.
    elements = 3 * (2 * (14 * 64 + 3 * 12 * 16) + 2 * (4 * 64 + 3 * 32) + 3 * 128) + 8 * 100
    assert parts.traffic == pytest.approx(2 * elements * 128 / 1e12)
    assert parts.optimizer == pytest.approx(34 * 120128 / 1e12)
    again = toy_parts(replace(ONE_GPU, tiled_head=True))
    assert again.products - parts.products == pytest.approx(6400 * 2 * 128 / 1e12)
    assert parts.alltoall == parts.tensor == parts.bubble == parts.reduction == parts.launches == 0


def test_messages_by_hand() -> None:
    # 16 ranks on two nodes: half of each token's two copies leave the node; dispatch, combine, there and back, twice.
    spread = replace(ONE_GPU, gpus=16, global_batch=128, expert=16, zero_stage=1)
    model = replace(TOY, num_experts=16)
    row = 2 * 64 * 64
    plain = predict(model, 100, spread, TOY_GPU, TOY_NETWORK, IDEAL).parts
    assert plain.alltoall == pytest.approx(2 * 4 * row * 2 / 2 / 1e10)
    # One copy a node: two draws of two nodes meet 1.5 of them.
    forwarded = predict(model, 100, replace(spread, one_copy_a_node=True), TOY_GPU, TOY_NETWORK, IDEAL).parts
    assert forwarded.alltoall == pytest.approx(2 * 4 * row * 1.5 / 2 / 1e10)
    assert distinct(2, 2) == 1.5
    # Gradients in 4 bytes once, parameters in 2: a node's eight ports for the dense part; experts have no replicas.
    dense = 120128 - 49152 + 8 * 64
    assert plain.reduction == pytest.approx(dense * 15 / 16 * 6 / 8e10)
    in_every_micro_batch = predict(model, 100, replace(spread, zero_stage=2), TOY_GPU, TOY_NETWORK, IDEAL).parts
    assert in_every_micro_batch.reduction == pytest.approx(dense * 15 / 16 * (2 + 2 * 4) / 8e10)


def test_imbalance_by_hand() -> None:
    # Four experts on a rank with MaxVio 0.6: the busiest rank has 1 + 0.6 / 2 of the mean.
    spread = replace(ONE_GPU, gpus=2, global_batch=16, expert=2, zero_stage=1)
    even, uneven = toy_parts(spread), toy_parts(replace(spread, max_violation=0.6))
    assert uneven.experts == pytest.approx(1.3 * even.experts)
    assert uneven.alltoall == pytest.approx(1.3 * even.alltoall)
    assert uneven.products == even.products
    # A rank that holds all experts works through its own tokens whoever gets them.
    assert toy_parts(replace(ONE_GPU, max_violation=0.6)) == toy_parts(ONE_GPU)


layouts = st.builds(
    lambda nodes, stage, expert, micro, accumulation, recompute, length, imbalance, software, once: Layout(
        gpus=8 * nodes, sequence_length=length, micro_batch=micro, global_batch=8 * nodes * micro * accumulation,
        zero_stage=stage if expert == 1 else 1 + stage % 2, expert=expert, recompute=recompute,
        max_violation=imbalance, software=software, one_copy_a_node=once,
    ),
    st.sampled_from([1, 2, 16, 512]), st.integers(0, 3), st.sampled_from([1, 2, 8]), st.integers(1, 16),
    st.integers(1, 8), st.sampled_from(["none", "act", "selective", "moe", "block"]),
    st.sampled_from([512, 4096, 16384]), st.floats(0, 3), st.sampled_from(["fused", "compiled", "eager"]),
    st.booleans(),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    layout=layouts, factor=st.floats(1, 3), gpu=st.sampled_from(sorted(GPUS)), network=st.sampled_from(sorted(NETWORKS))
)
def test_more_of_anything_is_never_slower(layout: Layout, factor: float, gpu: str, network: str) -> None:
    model = PUBLISHED[4].model

    def seconds(**changes: object) -> float:
        setting = {"layout": layout, "gpu": GPUS[gpu], "network": NETWORKS[network], "constants": Constants()} | changes
        return predict(model, 151936, **setting).seconds  # type: ignore[arg-type]

    base, slack = seconds(), 1 + 1e-9
    for name in ("peak_flops", "memory_bandwidth", "link_bandwidth"):
        better = replace(GPUS[gpu], **{name: getattr(GPUS[gpu], name) * factor})
        assert seconds(gpu=better) <= base * slack, name
    wider = replace(NETWORKS[network], bandwidth=NETWORKS[network].bandwidth * factor)
    assert seconds(network=wider) <= base * slack
    for item in fields(Constants):
        if "efficiency" in item.name or "hidden" in item.name:
            better = replace(Constants(), **{item.name: min(getattr(Constants(), item.name) * factor, 1.0)})
            assert seconds(constants=better) <= base * slack, item.name
    assert seconds(layout=replace(layout, max_violation=layout.max_violation * factor)) * slack >= base
    by_policy = [seconds(layout=replace(layout, recompute=policy)) for policy in ("none", "selective", "block")]
    assert by_policy[0] <= by_policy[1] * slack
    assert by_policy[1] <= by_policy[2] * slack
    prediction = predict(model, 151936, layout, GPUS[gpu], NETWORKS[network], Constants())
    assert 0 < prediction.mfu <= Constants().product_efficiency
    assert all(getattr(prediction.parts, part.name) >= 0 for part in fields(Parts))


def cluster(nodes: int, gpu: str = "h100", **changes: object) -> Cluster:
    known: dict[str, object] = {
        "gpu": GPUS[gpu], "network": NETWORKS["ib400"], "nodes": nodes, "gpus_per_node": 8, "max_violation": 0.1,
        "software": "eager", "needs_whole_step": True,
    }  # fmt: skip
    return Cluster(**(known | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
def test_memory_grows_with_the_micro_batch_and_shrinks_with_ranks(stage: int, recompute: str) -> None:
    overrides = [
        f"engine.zero_stage={stage}", "engine.expert_parallel_size=1", f"model.activation_recompute={recompute}"
    ]  # fmt: skip
    seen = []
    for micro_batch, nodes in ((1, 16), (2, 16), (4, 16), (4, 32)):
        config = load_run_config(
            ROOT / "configs/16b-a3b.yaml", [*overrides, f"train.micro_batch_size={micro_batch}",
                                            "train.global_batch_size=4096"], world_size=8 * nodes
        )  # fmt: skip
        seen.append(weigh(config, 102400, cluster(nodes), Constants()).memory_bytes)
    assert seen[0] < seen[1] < seen[2]
    assert seen[3] < seen[2]


@pytest.mark.parametrize("nodes", [1, 16, 512])
def test_what_is_recommended_fits_and_is_accepted(nodes: int) -> None:
    config = load_run_config(ROOT / "configs/16b-a3b.yaml", ["train.global_batch_size=8192"], world_size=8 * nodes)
    there = cluster(nodes, "h200")
    choices = ranked(config, 102400, there, Constants())
    best = choices[0]
    assert best.fits
    assert best.memory_bytes < USABLE * there.gpu.memory_bytes
    fitting = [choice for choice in choices if choice.fits]
    assert fitting == sorted(fitting, key=lambda choice: choice.prediction.seconds)
    again = load_run_config(
        ROOT / "configs/16b-a3b.yaml", ["train.global_batch_size=8192", *best.overrides.split()], world_size=8 * nodes
    )
    assert weigh(again, 102400, there, Constants()).prediction == best.prediction
    assert best.prediction.seconds <= weigh(config, 102400, there, Constants()).prediction.seconds
    changes = elasticities(best, 102400, there, Constants())
    assert list(changes.values()) == sorted(changes.values(), key=lambda pair: -max(map(abs, pair)))
    assert changes["memory_efficiency"][0] > 0 > changes["memory_efficiency"][1]


def test_published_figures_are_met_within_a_quarter() -> None:
    for row in PUBLISHED:
        if row.required:
            assert foretell(row, Constants()) == pytest.approx(row.tflops, rel=WITHIN), row.name


@pytest.mark.parametrize("name", FITTED)
def test_fitted_constants_are_those_of_the_fit(name: str) -> None:
    rows = [row for row in PUBLISHED if row.required and FITTED[name](row)]
    assert getattr(Constants(), name) == pytest.approx(fit(name, rows, Constants()))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--predict", "--nodes", "0"], "--nodes: 0 must be at least 1"),
        (["--predict", "--nodes", "2", "--world-size", "3"], "--world-size: 3 is not --nodes x --gpus-per-node = 16"),
        (["--predict", "--max-vio", "-1"], "--max-vio: -1.0 must be finite"),
        (["--nodes", "2"], "--nodes: is read with --predict only"),
        (["--max-vio", "0.1"], "--max-vio: is read with --predict only"),
        (["--published"], "--published: stands alone"),
        (["--predict", "engine.precision=fp32"], "engine.precision: steps are foretold in bf16 only"),
        (["--predict", "engine.offload_optimizer=true"], "engine.offload_optimizer: is not foretold"),
        (["--predict", "engine.sequence_parallel_size=2"], "engine.sequence_parallel_size: is not foretold"),
        (
            ["--predict", "--nodes", "7"],
            "global_batch_size: 4608 is not divisible by 56 ranks, in no layout; for instance 4648",
        ),
        (["--predict", "--nodes", "1024"], "train.global_batch_size: 4608 is not divisible by 8192 ranks"),
        (
            ["--predict", "profile.trace_steps=[3]", "profile.trace_ranks=[9]"],
            "profile.trace_ranks: there is no rank 9",
        ),
    ],
)
def test_wrong_questions_get_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(dryrun.main, [str(ROOT / "configs/16b-a3b.yaml"), *arguments]) == 2
    captured = capsys.readouterr()
    assert line in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--nodes", "64"], "train.global_batch_size: 4608 is not divisible by micro_batch_size x ranks = 2 x 512"),
        (["--nodes", "12", "engine.expert_parallel_size=64"], "expert_parallel_size: 64 does not divide"),
    ],
)
def test_a_layout_that_does_not_fit_so_many_ranks_is_replaced(
    arguments: list[str], why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    command = [str(ROOT / "configs/16b-a3b.yaml"), "--predict", *arguments]
    assert run_command(dryrun.main, command) == 0
    shown = capsys.readouterr().out
    line = shown.splitlines()[0]
    assert line.startswith("as configured it does not run on ")
    assert why in line
    assert line.endswith("What follows is the fastest layout that fits.")
    (recommended,) = re.findall(r"recommended: ((?:[\w.]+=\S+\s+){4})", shown)
    assert "last row: as configured" not in shown
    assert run_command(dryrun.main, [*command, *recommended.split()]) == 0
    taken = capsys.readouterr().out
    assert "does not run" not in taken
    seconds = re.compile(r"│ all +│ +([\d.]+) │ +│$", re.MULTILINE)
    assert seconds.findall(taken) == seconds.findall(shown) != [], "the tables are those of what is recommended"


def test_a_model_too_large_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs/qwen3-30b-a3b.yaml")
    assert run_command(dryrun.main, [config, "--predict", "engine.zero_stage=1", "engine.expert_parallel_size=1"]) == 0
    assert "NOTHING FITS" in capsys.readouterr().out


PAGE = (ROOT / "launch/PREDICTION.md").read_text()


@pytest.mark.parametrize("line", re.findall(r"^python -m launch\.dryrun (.*)$", PAGE, re.MULTILINE))
def test_the_commands_of_the_page_run(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert run_command(dryrun.main, shlex.split(line)) == 0
    assert "foretold" in capsys.readouterr().out
