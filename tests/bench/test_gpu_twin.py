"""Every family of the GPU bench runs on a CPU too, with tiny shapes and one round: the same code, the same keys."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.balance_metrics import max_violation
from moe.router import count_tokens
from tests.bench.collectives import LocalEngine
from tests.bench.gpu import layer, loss_head, step
from tests.bench.gpu.layer import Shape
from tests.bench.gpu.targets import AT_LEAST, AT_MOST
from tests.bench.report import Report, Row
from tests.bench.steps import OurStep, StepShape
from tests.bench.timing import cpu_seconds, stopwatch
from tests.gpu.host_syncs import HostSyncs
from tests.harness import run
from tests.moe.test_parity import copy_weights

CPU = torch.device("cpu")
SHAPES = {name: Shape(8, 2, 64, 32, 256) for name in list(layer.SHAPES)[:1]}
ONCE: dict[str, Any] = {"rounds": 1, "warm_up": 0}


def tiny_shape() -> StepShape:
    model = replace(
        step.MODEL, hidden_size=32, num_layers=2, dense_intermediate_size=64, num_heads=4, num_kv_heads=4, head_dim=8,
        num_experts=8, top_k=2, expert_intermediate_size=16,
    )  # fmt: skip
    return replace(step.full_shape(CPU), model=model, vocab_size=64, sequence=32)


FAMILIES: dict[str, tuple[Callable[[Report], None], set[str]]] = {
    "moe_layer": (lambda report: layer.measure(report, CPU, shapes=SHAPES, **ONCE), {"gpu/moe_layer/"}),
    "skew": (lambda report: layer.measure_skew(report, CPU, shapes=SHAPES, **ONCE), {"gpu/skew/"}),
    "loss_head": (
        lambda report: loss_head.measure(report, CPU, size=loss_head.Size(512, 32, 64), **ONCE),
        {"gpu/loss_head/"},
    ),
    "train_step": (
        lambda report: step.measure(report, CPU, shape=tiny_shape(), rounds=1, warm_up=1),
        {"gpu/train_step/mfu", "gpu/hooks/", "gpu/host_syncs/"},
    ),
    "train_step_peer": (
        lambda report: step.measure_peer(report, CPU, shape=tiny_shape(), **ONCE), {"gpu/train_step/tokens_ratio"}
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """The reports of the families that start DeepSpeed, which a process of its own keeps from the other tests."""
    folder = tmp_path_factory.mktemp("twin")
    names = [name for name in FAMILIES if name.startswith("train_step")]
    done = run("tests.bench.test_gpu_twin", str(folder), *names)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = {}
    for name in names:
        found = json.loads((folder / name).read_text())
        reports[name] = Report(AT_LEAST, AT_MOST)
        reports[name].rows = {key: Row(*row) for key, row in found["rows"].items()}
        reports[name].missing = found["missing"]
    return reports


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_measures_what_has_a_target_or_says_why_not(name: str, request: pytest.FixtureRequest) -> None:
    measure, prefixes = FAMILIES[name]
    if name.startswith("train_step"):
        report = request.getfixturevalue("steps")[name]
    else:
        measure(report := Report(AT_LEAST, AT_MOST))
    assert report.rows
    for key, row in report.rows.items():
        assert math.isfinite(row.median), key
        assert row.median > 0, key
    spoken_of = report.rows.keys() | report.missing.keys()
    for target in [*AT_LEAST, *AT_MOST]:
        other_shape = any(f"/{shape}" in target for shape in layer.SHAPES.keys() - SHAPES.keys())
        if not target.startswith(tuple(prefixes)) or other_shape:
            continue
        # A peer that is not there is missing as a whole, not pass by pass.
        as_whole = target.replace("/forward/", "/").replace("/both/", "/")
        assert target in spoken_of or as_whole in spoken_of, target


def test_the_bound_of_another_arithmetic_is_noticed() -> None:
    shape = Shape(8, 2, 64, 32, 256)
    choices_NK = layer.balanced_choices(shape, CPU)
    workload = layer.workload_of(shape, CPU, choices_NK)
    bound = layer.Bound(workload, choices_NK)
    bound.check(workload.cotangent_BTD[0])
    bound.x_ECD = bound.x_ECD.flip(0)
    with pytest.raises(AssertionError, match="not the layer's arithmetic"):
        bound.check(workload.cotangent_BTD[0])


def test_loads_are_as_even_and_as_skewed_as_told() -> None:
    shape = Shape(64, 8, 64, 32, 4096)
    everyone_N = torch.ones(shape.tokens, dtype=torch.bool)
    torch.manual_seed(0)
    for choices_NK, low, high in (
        (layer.balanced_choices(shape, CPU), 0, 0), (layer.zipf_choices(shape, CPU), 3, 8),
    ):  # fmt: skip
        layer.workload_of(shape, CPU, choices_NK)  # asserts that the router chooses so
        assert choices_NK.sort(dim=-1).values.diff(dim=-1).min() > 0, "a token's experts are distinct"
        assert low <= max_violation(count_tokens(choices_NK, everyone_N, shape.num_experts)) <= high


def test_an_input_that_routes_otherwise_is_refused() -> None:
    shape = Shape(8, 2, 64, 32, 256)
    with pytest.raises(AssertionError, match="does not route as told"):
        layer.workload_of(shape, CPU, torch.zeros(256, 2, dtype=torch.int64))


def test_balance_is_forced_inside_only() -> None:
    shape = tiny_shape()
    model = shape.build()
    ours = OurStep(LocalEngine(model), shape, {"expert_bias": step.ExpertBiasHook(step.ExpertBiasConfig())})  # type: ignore[arg-type]
    found = []
    with step.forced_balance(model):
        ours.after(ours.accumulate())
        found.append(float(ours.records.values["moe/maxvio_batch"]))
    ours.after(ours.accumulate())
    found.append(float(ours.records.values["moe/maxvio_batch"]))
    assert found[0] == 0 < found[1]


def test_nothing_mixes_tensors_of_host_and_device() -> None:
    """On the meta device, which refuses them beside its own, and which has no numbers to be asked for."""
    meta = torch.device("meta")
    with pytest.raises(RuntimeError, match=r"[Dd]evice"):
        torch.ones(3, device=meta) + torch.ones(3)
    shape = Shape(8, 2, 64, 32, 256)
    choices_NK = layer.balanced_choices(shape, meta)
    workload = layer.Workload(shape.config, shape.tokens, device=meta, dtype=torch.bfloat16, choices_NK=choices_NK)
    workload.run(workload.layer)
    layer.Bound(workload, choices_NK).both()
    layer.zipf_choices(shape, meta)
    loss_head.Head(loss_head.Size(512, 32, 64), meta).run()
    step_shape = replace(tiny_shape(), device=meta)
    model, tokens_BT = step_shape.build(), torch.zeros(2, 32, dtype=torch.int64, device=meta)
    model(tokens_BT, tokens_BT, tokens_BT).mean().backward()
    copy_weights(model, step_shape.build_transformers())


def test_without_a_gpu_time_is_cpu_time_and_nothing_waits() -> None:
    assert stopwatch(CPU) is cpu_seconds
    before = torch.cuda.synchronize, torch.cuda.Event.synchronize
    with HostSyncs() as syncs:
        torch.ones(1).item()
    assert syncs.count == 0
    assert (torch.cuda.synchronize, torch.cuda.Event.synchronize) == before


if __name__ == "__main__":
    for chosen in sys.argv[2:]:
        FAMILIES[chosen][0](kept := Report(AT_LEAST, AT_MOST))
        (Path(sys.argv[1]) / chosen).write_text(json.dumps({"rows": kept.rows, "missing": kept.missing}))
