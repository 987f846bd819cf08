"""`gpu/train_step`, `gpu/hooks` and `gpu/host_syncs`: whole optimizer steps of a model of a billion active parameters.

All of it runs through our engine (DeepSpeed, ZeRO 1, bf16), accumulation and hooks on one GPU: no collective moves
anything, so none of this says what several GPUs do. Where two engines must be in memory at once, for transformers'
step beside ours, both have the same widths and fewer layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from moe.arithmetic import count_parameters, flops_per_token
from moe.bias_hook import ExpertBiasConfig, ExpertBiasHook
from moe.config import ModelConfig
from moe.model import MoEDecoder
from reweighting.hook import FrozenConfig, SampleReweightConfig, SampleReweightHook
from tests.bench.group import join_process_group
from tests.bench.report import Report
from tests.bench.steps import OurStep, StepShape, TransformersStep
from tests.bench.timing import Stopwatch, Timing, interleaved, stopwatch
from tests.gpu.host_syncs import HostSyncs
from tests.moe.test_parity import copy_weights
from trainer.engine_config import EngineConfig
from trainer.gpu_peaks import peak_flops
from trainer.hooks import Hook

# 2.67 B parameters, 1.01 B active. On 80 GB: 45 GiB of parameters, gradients and Adam's state at 18 bytes each, about
# 14 GiB of one micro-batch's graph.
MODEL = ModelConfig(
    hidden_size=2048, num_layers=12, num_dense_layers=1, dense_intermediate_size=8192, num_heads=16, num_kv_heads=16,
    head_dim=128, num_experts=32, top_k=8, expert_intermediate_size=1024, num_shared_experts=1, router_score="sigmoid",
    normalize_gates=True, qk_norm=True, norm_eps=1e-5,
)  # fmt: skip
PAIR_LAYERS = 5  # 18 bytes of twice 1.1 B parameters


def full_shape(device: torch.device) -> StepShape:
    """Two micro-batches of two rows of 4096 tokens."""
    return StepShape(
        model=MODEL, vocab_size=32768, sequence=4096, micro_batch=2, micro_batches=2,
        engine=EngineConfig(zero_stage=1, precision="bf16"), device=device,
    )  # fmt: skip


def measure(
    report: Report, device: torch.device, *, shape: StepShape | None = None, rounds: int = 10, warm_up: int = 3
) -> None:
    """Tokens a second, MFU, memory; what each hook adds to a step; where the host waits in it."""
    shape = shape or full_shape(device)
    watch = stopwatch(device)
    join_process_group()
    engine = OurStep.start_engine(shape.build(), shape)
    bias = ExpertBiasHook(ExpertBiasConfig())
    # Frozen weights fall back to exact steps when they are off: here every step shall be a frozen one.
    weights = SampleReweightHook(SampleReweightConfig(record_every=0, frozen=FrozenConfig(tolerance=1e9)))
    variants: dict[str, dict[str, Hook]] = {
        "plain": {}, "bias": {"expert_bias": bias}, "frozen": {"sample_reweight": weights},
        "both": {"expert_bias": bias, "sample_reweight": weights},
    }  # fmt: skip
    modes = {name: "frozen" if "sample_reweight" in hooks else "streaming" for name, hooks in variants.items()}
    steps = {name: OurStep(engine, shape, hooks, modes[name]) for name, hooks in variants.items()}  # type: ignore[arg-type]
    model = engine.module
    assert isinstance(model, MoEDecoder)

    _forget_peak(device)
    times = interleaved(dict(steps), rounds=rounds, warm_up=warm_up, watch=watch)
    _report_peak(report, device)
    assert all(steps[name].records.values["reweight/frozen"] for name in ("frozen", "both")), "an exact step was timed"
    report.add(
        "gpu/hooks/frozen",
        times["frozen"].median / times["plain"].median,
        times["frozen"].minimum / times["plain"].minimum,
    )
    _measure_bias(report, steps["bias"], times["plain"], watch, rounds)
    _report_speed(report, shape, "routed", times["both"], f"MaxVio {_max_violation(steps['both']):.2f}")
    with forced_balance(model):
        timing = interleaved({"both": steps["both"]}, rounds=rounds, warm_up=warm_up, watch=watch)["both"]
        _report_speed(report, shape, "balanced", timing, f"MaxVio {_max_violation(steps['both']):.2f}")
    _count_syncs(report, steps["both"], model, shape)


def measure_peer(
    report: Report, device: torch.device, *, shape: StepShape | None = None, rounds: int = 10, warm_up: int = 3
) -> None:
    """Tokens a second against transformers under DeepSpeed; ours has the bias hook."""
    shape = shape or full_shape(device).with_layers(PAIR_LAYERS)
    join_process_group()
    ours, theirs = shape.build(), shape.build_transformers()
    copy_weights(ours, theirs)
    engine = OurStep.start_engine(ours, shape)
    steps = {
        "ours": OurStep(engine, shape, {"expert_bias": ExpertBiasHook(ExpertBiasConfig())}),
        "theirs": TransformersStep(theirs, shape),
    }
    losses = {name: [float(step()) for _ in range(3)] for name, step in steps.items()}
    # The third loss is two updates away from the weights that were shared.
    for mine, other in zip(losses["ours"], losses["theirs"], strict=True):
        assert abs(mine - other) < 1e-2 * mine, losses
    times = interleaved(dict(steps), rounds=rounds, warm_up=warm_up, watch=stopwatch(device))
    of, to = times["theirs"], times["ours"]
    note = f"transformers under DeepSpeed, {shape.model.num_layers} layers, {shape.tokens / to.median:.0f} tokens/s"
    report.add("gpu/train_step/tokens_ratio", of.median / to.median, of.minimum / to.minimum, note=note)


@contextmanager
def forced_balance(model: MoEDecoder) -> Iterator[None]:
    """Inside, tokens are dealt to experts in turn, whatever their scores."""
    routers = [layer.router for layer in model.moe_layers()]
    before = [router._config for router in routers]
    for router in routers:
        router._config = replace(router._config, uniform_routing=True)
    try:
        yield
    finally:
        for router, config in zip(routers, before, strict=True):
            router._config = config


def _measure_bias(report: Report, step: OurStep, plain: Timing, watch: Stopwatch, rounds: int) -> None:
    """The hook takes less than what two steps differ by: its own time is set against that of a step."""
    spent = []
    for _ in range(rounds):
        done = step.accumulate()
        step.optimize(done)
        spent.append(watch(lambda done=done: step.after(done)))  # type: ignore[misc]
    spent.sort()
    middle = spent[len(spent) // 2]
    note = f"{1e6 * middle:.0f} us"
    report.add("gpu/hooks/bias", 1 + middle / plain.median, 1 + spent[0] / plain.minimum, note=note)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _report_peak(report: Report, device: torch.device) -> None:
    if device.type != "cuda":
        report.not_run("gpu/train_step/peak_gib", "counted by the GPU's allocator only")
        return
    peak, whole = torch.cuda.max_memory_allocated(device), torch.cuda.mem_get_info(device)[1]
    report.add("gpu/train_step/peak_gib", peak / 2**30, note=f"of {whole / 2**30:.0f}, with both hooks")


def _max_violation(step: OurStep) -> float:
    return float(step.records.values["moe/maxvio_batch"])


def _report_speed(report: Report, shape: StepShape, routing: str, timing: Timing, note: str) -> None:
    parameters = count_parameters(shape.model, shape.vocab_size)
    size = f"{parameters.num_total / 1e9:.2f} B parameters, {parameters.num_active / 1e9:.2f} B active"
    report.add(
        f"gpu/train_step/tokens_per_s/{routing}",
        shape.tokens / timing.median,
        shape.tokens / timing.minimum,
        note=f"{note}, {size}, {1e3 * timing.median:.0f} ms a step",
    )
    peak = peak_flops(shape.device, shape.engine.precision)
    if peak is None:
        report.not_run(f"gpu/train_step/mfu/{routing}", "the peak of this device is not in trainer/gpu_peaks.py")
        return
    flops = flops_per_token(shape.model, shape.vocab_size, shape.sequence) * shape.tokens
    ratios = flops / timing.median / peak, flops / timing.minimum / peak
    report.add(f"gpu/train_step/mfu/{routing}", *ratios, note=f"of {peak / 1e12:.0f} TFLOP/s, active FLOPs")


def _count_syncs(report: Report, step: OurStep, model: MoEDecoder, shape: StepShape) -> None:
    """Waits of one step, part by part. DeepSpeed's are counted too: a user pays for them like for any other."""
    batch = shape.batches(0)[0].to(shape.device)
    with HostSyncs() as in_model:  # without the engine: its hooks see no gradient that is asked for by name
        loss = model(batch.tokens_bT, batch.labels_bT, batch.documents_bT).mean()
        torch.autograd.grad(loss, list(model.parameters()))
    with HostSyncs() as in_accumulation:
        done = step.accumulate()
    with HostSyncs() as in_optimizer:
        step.optimize(done)
    with HostSyncs() as in_hooks:
        step.after(done)
    for part, syncs, note in (
        ("model", in_model, "forward and backward, without engine"),
        ("accumulate", in_accumulation, "declared are two: the verdict on losses, the audit of frozen weights"),
        ("optimizer", in_optimizer, "DeepSpeed's"),
        ("hooks", in_hooks, "after the step"),
    ):
        if shape.device.type == "cuda":
            report.add(f"gpu/host_syncs/{part}", syncs.count, note=f"{note}; explicit {syncs.explicit}")
        else:
            report.not_run(f"gpu/host_syncs/{part}", "there is no device to wait for")
