"""`host_waits`: how often a step in bf16 would make the host wait for a GPU, counted by operation on a CPU.

`gpu/host_syncs` of `make gpu-bench` counts on a GPU, and there also what libraries wait for explicitly.
"""

from dataclasses import replace

from moe.bias_hook import ExpertBiasConfig, ExpertBiasHook
from reweighting.hook import SampleReweightConfig, SampleReweightHook
from tests.bench.group import join_process_group
from tests.bench.hooks import MODEL
from tests.bench.report import Report
from tests.bench.steps import OurStep, StepShape
from tests.bench.timing import CPU
from tests.waits import DeviceWaits
from trainer.engine_config import EngineConfig

STAGES = (0, 1, 2, 3)


def measure(report: Report) -> None:
    """Waits of a step with both hooks, without DeepSpeed's; and those of DeepSpeed's step at each ZeRO stage."""
    join_process_group()
    for stage in STAGES:
        shape = StepShape(
            model=replace(MODEL, num_layers=2, hidden_size=64, head_dim=8, expert_intermediate_size=16), vocab_size=256,
            sequence=32, micro_batch=2, micro_batches=2, engine=EngineConfig(zero_stage=stage), device=CPU,
        )  # fmt: skip
        hooks = {
            "expert_bias": ExpertBiasHook(ExpertBiasConfig()),
            "sample_reweight": SampleReweightHook(SampleReweightConfig(record_every=0)),
        }
        step = OurStep(OurStep.start_engine(shape.build(), shape), shape, hooks, "two_pass")
        step()  # the first one makes the optimizer's state
        with DeviceWaits() as ours:
            done = step.accumulate()
        with DeviceWaits() as deepspeeds:
            step.optimize(done)
        with ours:
            step.after(done)
        if stage == 1:
            report.add("host_waits/step", len(ours.places), note="forward, hooks, backward; the verdict on losses")
        report.add(f"host_waits/deepspeed/zero_{stage}", len(deepspeeds.places), note="clipping and optimizer")
