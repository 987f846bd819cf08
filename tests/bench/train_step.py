"""`train_step`: tokens a second and peak memory of a whole optimizer step against what a user would pick instead.

One GLM-4-MoE of four layers in all, with the same weights, batches, AdamW and clipping: ours, with the bias hook,
transformers' under DeepSpeed, and torchtitan's (torchtitan_step.py), which partitions nothing on one rank, so that
beside it ours is at ZeRO 0. Peers are in their best setting: grouped products, scaled-dot-product attention, bare loops
instead of Trainers. Losses and gradients of the first step are compared before anything is timed. megatron-core's
GPTModel runs on no CPU unless its functions are replaced from outside, so it is listed as not run.

`python -m tests.bench.train_step NAME` prints the MiB that two steps of one of them add to the memory in use, models
and optimizer states included, and the peak of the whole process.
"""

import contextlib
import copy
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from moe.bias_hook import ExpertBiasConfig, ExpertBiasHook
from moe.config import ModelConfig
from moe.model import MoEDecoder
from tests.bench import torchtitan_step
from tests.bench.group import join_process_group
from tests.bench.memory import memory_added, printed_by
from tests.bench.report import Report
from tests.bench.steps import OurStep, StepShape, TransformersStep
from tests.bench.timing import CPU, interleaved
from tests.moe.test_parity import copy_weights
from trainer.engine_config import EngineConfig

VOCAB, SEQUENCE, MICRO_BATCH, MICRO_BATCHES = 4096, 256, 4, 2
SHAPE = ModelConfig(
    hidden_size=256, num_layers=4, num_dense_layers=1, dense_intermediate_size=704, num_heads=8, num_kv_heads=4,
    head_dim=32, num_experts=16, top_k=2, expert_intermediate_size=256, num_shared_experts=1, router_score="sigmoid",
    normalize_gates=True, qk_norm=True, norm_eps=1e-5,
)  # fmt: skip
STEP = StepShape(
    model=SHAPE, vocab_size=VOCAB, sequence=SEQUENCE, micro_batch=MICRO_BATCH, micro_batches=MICRO_BATCHES,
    engine=EngineConfig(zero_stage=1, precision="fp32"), device=CPU,
)  # fmt: skip
OURS = {"ours": STEP, "ours_zero_0": replace(STEP, engine=EngineConfig(zero_stage=0, precision="fp32"))}
TINY = replace(SHAPE, hidden_size=64, dense_intermediate_size=64, expert_intermediate_size=16, head_dim=8)
PEERS = {"transformers": "ours", "torchtitan_fp32": "ours_zero_0", "torchtitan_bf16": "ours_zero_0"}
"""What each is compared with."""
TOLERANCE = {"transformers": 1e-4, "torchtitan_fp32": 1e-4, "torchtitan_bf16": 0.1}
"""Of the loss, and of the gradient of each parameter, relative."""
NOT_ON_A_CPU = "its GPTModel asks for CUDA in router, rotary table and mask"

Step = Callable[[], float]


def measure(report: Report, rounds: int = 3) -> None:
    """Ratios of tokens a second and of memory, peers over ours."""
    report.not_run("train_step/peer/megatron", NOT_ON_A_CPU)
    torch.manual_seed(0)
    ours = MoEDecoder(SHAPE, vocab_size=VOCAB)
    peers = {}
    for name in PEERS:
        try:
            peers[name] = build_peer(name, SHAPE)
            share_weights(name, ours, peers[name])
            check(name, ours, peers[name])
        except Exception as error:  # a peer that is not there, or computes something else, is listed with the reason
            report.not_run(f"train_step/peer/{name}", error)
            peers.pop(name, None)
    join_process_group()
    steps = {name: start_ours(copy.deepcopy(ours), step) for name, step in OURS.items()}
    del ours
    times = interleaved(
        steps | {name: start_peer(name, model) for name, model in peers.items()}, rounds=rounds, warm_up=2
    )
    for name in peers:
        of, to = times[name], times[PEERS[name]]
        note = "its experts in bf16, ours in fp32: not the same work" if name.endswith("bf16") else ""
        report.add(f"train_step/peer/{name}", of.median / to.median, of.minimum / to.minimum, note=note)
    alike = {name: report.rows[f"train_step/peer/{name}"] for name in peers if not name.endswith("bf16")}
    if alike:
        best = min(alike, key=lambda name: alike[name].median)
        report.add("train_step/tokens_ratio", alike[best].median, alike[best].minimum, note=best)
    _measure_memory(report)


def build_peer(name: str, shape: ModelConfig) -> nn.Module:
    """A peer's model of a shape; ImportError where it is not installed."""
    if name != "transformers":
        return torchtitan_step.build_model(shape, VOCAB, SEQUENCE, fp32=name == "torchtitan_fp32")
    return replace(STEP, model=shape).build_transformers()


def share_weights(name: str, ours: MoEDecoder, theirs: nn.Module) -> None:
    """Give the peer our weights; the first one, transformers, gives its own to us: tests/moe has that direction."""
    if name == "transformers":
        copy_weights(ours, theirs)
    else:
        theirs.load_state_dict(torchtitan_step.their_layout(ours))


def check(name: str, ours: MoEDecoder, theirs: nn.Module) -> None:
    """AssertionError unless the first micro-batch has the same loss and the same gradient in both."""
    batch = STEP.batches(0)[0]
    found = ours(batch.tokens_bT, batch.labels_bT, batch.documents_bT).mean()
    if name == "transformers":
        expected = theirs(input_ids=batch.tokens_bT, labels=batch.labels_bT, shift_labels=batch.labels_bT).loss
    else:
        logits = theirs(batch.tokens_bT)
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels_bT.flatten())
    found.backward()
    expected.backward()
    with _gradients_as_weights(ours), _gradients_as_weights(theirs):
        if name == "transformers":
            twin = copy.deepcopy(ours)
            copy_weights(twin, theirs)
            pairs = list(zip(ours.parameters(), twin.parameters(), strict=True))
        else:
            there = theirs.state_dict()
            pairs = [(mine, there[key]) for key, mine in torchtitan_step.their_layout(ours).items()]
        difference = max(_relative(mine, other) for mine, other in pairs if mine.any())
    ours.take_loads("train")
    loss = _relative(found, expected)
    if not max(loss, difference) < TOLERANCE[name]:
        raise AssertionError(f"loss differs by {loss:.1e}, a gradient by {difference:.1e}")


def _relative(one: Tensor, other: Tensor) -> float:
    """Norm of the difference over that of the first."""
    return float(torch.dist(one.detach(), other.detach()) / one.detach().norm())


@contextlib.contextmanager
def _gradients_as_weights(model: nn.Module) -> Iterator[None]:
    """Inside, the parameters hold their gradients, so that what maps weights maps these; afterwards they have none."""
    weights = {parameter: parameter.data for parameter in model.parameters()}
    for parameter in weights:
        assert parameter.grad is not None
        parameter.data = parameter.grad
    try:
        yield
    finally:
        for parameter, weight in weights.items():
            parameter.data, parameter.grad = weight, None


def start_ours(model: MoEDecoder, shape: StepShape) -> OurStep:
    """A step of our loop with the bias hook."""
    return OurStep(OurStep.start_engine(model, shape), shape, {"expert_bias": ExpertBiasHook(ExpertBiasConfig())})


def start_peer(name: str, model: nn.Module) -> Step:
    """A function that trains one step."""
    if name == "transformers":
        return TransformersStep(model, STEP)
    step, count = torchtitan_step.TorchtitanStep(model, STEP.optimizer), iter(range(10**9))
    return lambda: step(STEP.batches(next(count)))


def _measure_memory(report: Report) -> None:
    """Peak of a process that trains two steps of ours over that of a peer, the allocator as it comes; the worst counts.

    The peak is of all that is in memory, libraries too, and the same to 2 % from run to run. What the steps add to it
    moves by 10 %.
    """
    names = [name for name in (*OURS, *PEERS) if not name.endswith("bf16")]
    peaks, ratios = dict[str, float](), dict[str, float]()
    for name, printed in printed_by("tests.bench.train_step", names).items():
        if isinstance(printed, str):
            report.not_run(f"train_step/memory/{name}", printed)
            continue
        added, peaks[name] = printed
        report.add(f"train_step/memory/{name}", peaks[name], note=f"MiB, of which steps add about {added:.0f}")
        if (mine := PEERS.get(name)) in peaks:
            ratios[name] = peaks[mine] / peaks[name]
    if ratios:
        worst = max(ratios, key=ratios.__getitem__)
        report.add("train_step/memory_ratio", ratios[worst], note=f"{PEERS[worst]} over {worst}")


def _two_steps(name: str, shape: ModelConfig) -> None:
    """From nothing to the end of a second step: the first makes the optimizer's states."""
    torch.manual_seed(0)
    if name in OURS:
        step: Step = start_ours(MoEDecoder(shape, vocab_size=VOCAB), OURS[name])
    else:
        model = build_peer(name, shape)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)
        step = start_peer(name, model)
    for _ in range(2):
        step()
    del step
    gc.collect()  # DeepSpeed's engines are cycles


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = sys.argv[1]
    join_process_group()
    found = memory_added(lambda: _two_steps(chosen, TINY), lambda: _two_steps(chosen, SHAPE))
    sys.stdout.write("{:.1f} {:.1f}\n".format(*found))
