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
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moe.bias_hook import ExpertBiasConfig, ExpertBiasHook
from moe.config import ModelConfig
from moe.model import MoEDecoder
from tests.bench import torchtitan_step
from tests.bench.group import join_process_group
from tests.bench.memory import memory_added
from tests.bench.report import Report
from tests.bench.timing import interleaved
from tests.moe.test_bias_hook import run_of
from tests.moe.test_parity import copy_weights
from trainer.accumulate import Accumulator
from trainer.data.loader import MicroBatch
from trainer.engine import Engine, EngineConfig
from trainer.hooks import HookList, StepResult
from trainer.metrics import MetricBuffer
from trainer.optim import OptimizerConfig, build_adamw

VOCAB, SEQUENCE, MICRO_BATCH, MICRO_BATCHES = 4096, 256, 4, 2
ENGINE = EngineConfig(zero_stage=1, precision="fp32")
OURS = {"ours": ENGINE, "ours_zero_0": EngineConfig(zero_stage=0, precision="fp32")}
OPTIMIZER = OptimizerConfig(learning_rate=1e-4)
SHAPE = ModelConfig(
    hidden_size=256, num_layers=4, num_dense_layers=1, dense_intermediate_size=704, num_heads=8, num_kv_heads=4,
    head_dim=32, num_experts=16, top_k=2, expert_intermediate_size=256, num_shared_experts=1, router_score="sigmoid",
    normalize_gates=True, qk_norm=True, norm_eps=1e-5,
)  # fmt: skip
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
    steps = {name: _Ours(copy.deepcopy(ours), engine) for name, engine in OURS.items()}
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
    import transformers

    return transformers.Glm4MoeForCausalLM(
        transformers.Glm4MoeConfig(
            vocab_size=VOCAB, hidden_size=shape.hidden_size, intermediate_size=shape.dense_intermediate_size,
            num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_dim, partial_rotary_factor=1.0,
            rms_norm_eps=shape.norm_eps, attention_bias=False, use_qk_norm=True, n_routed_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k, moe_intermediate_size=shape.expert_intermediate_size,
            n_shared_experts=shape.num_shared_experts, first_k_dense_replace=shape.num_dense_layers, n_group=1,
            topk_group=1, routed_scaling_factor=1.0, norm_topk_prob=True, tie_word_embeddings=False,
            max_position_embeddings=SEQUENCE, experts_implementation="grouped_mm", attn_implementation="sdpa",
            use_cache=False, rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        )
    )  # fmt: skip


def share_weights(name: str, ours: MoEDecoder, theirs: nn.Module) -> None:
    """Give the peer our weights; the first one, transformers, gives its own to us: tests/moe has that direction."""
    if name == "transformers":
        copy_weights(ours, theirs)
    else:
        theirs.load_state_dict(torchtitan_step.their_layout(ours))


def check(name: str, ours: MoEDecoder, theirs: nn.Module) -> None:
    """AssertionError unless the first micro-batch has the same loss and the same gradient in both."""
    batch = _batches(0)[0]
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


def start_peer(name: str, model: nn.Module) -> Step:
    """A function that trains one step."""
    if name == "transformers":
        return _Transformers(model)
    step, count = torchtitan_step.TorchtitanStep(model, OPTIMIZER), iter(range(10**9))
    return lambda: step(_batches(next(count)))


def _batches(step: int) -> list[MicroBatch]:
    """The micro-batches of a step, the same for all."""
    generator = torch.Generator().manual_seed(step)
    found = []
    for m in range(MICRO_BATCHES):
        tokens_bT = torch.randint(0, VOCAB, (MICRO_BATCH, SEQUENCE + 1), generator=generator)
        ids_b = torch.arange(MICRO_BATCH) + MICRO_BATCH * (m + MICRO_BATCHES * step)
        zeros_b = torch.zeros_like(ids_b)
        found.append(
            MicroBatch(
                tokens_bT=tokens_bT[:, :-1].contiguous(), labels_bT=tokens_bT[:, 1:].contiguous(),
                documents_bT=torch.zeros(MICRO_BATCH, SEQUENCE, dtype=torch.int64), sample_ids_b=ids_b,
                domains_b=zeros_b, digests_b=zeros_b,
            )
        )  # fmt: skip
    return found


class _Ours:
    """A step of our loop with the bias hook."""

    def __init__(self, model: MoEDecoder, engine: EngineConfig) -> None:
        optimizer = build_adamw(model, OPTIMIZER, torch.device("cpu"))
        self._engine = Engine(
            model, optimizer, engine, micro_batch_size=MICRO_BATCH, clip_norm=OPTIMIZER.clip_norm
        )  # fmt: skip
        self._hooks = HookList({"expert_bias": ExpertBiasHook(ExpertBiasConfig())})
        self._hooks.on_start(run_of(model))
        self._accumulator = Accumulator(
            self._engine, self._hooks, mode="streaming", normalization="tokens", num_micro_batches=MICRO_BATCHES,
            samples_per_row=1, device=torch.device("cpu"),
        )  # fmt: skip
        self._count = 0

    def __call__(self) -> float:
        buffer = MetricBuffer()
        done = self._accumulator.run(
            _batches(self._count), step=self._count + 1, applied_steps=self._count, recorder=buffer
        )
        self._engine.step(OPTIMIZER.learning_rate, done.gradient_scale)
        self._hooks.after_step(done.context, StepResult(applied=True, reason=""))
        self._count += 1
        assert done.loss is not None
        return done.loss


class _Transformers:
    """A step of transformers' model under DeepSpeed, as its documentation has it."""

    def __init__(self, model: nn.Module) -> None:
        import deepspeed

        settings: dict[str, Any] = ENGINE.deepspeed_dict(micro_batch_size=MICRO_BATCH, clip_norm=OPTIMIZER.clip_norm)
        settings["gradient_accumulation_steps"] = MICRO_BATCHES
        optimizer = build_adamw(model, OPTIMIZER, torch.device("cpu"))
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self._engine.train()
        self._count = 0

    def __call__(self) -> float:
        losses = []
        for batch in _batches(self._count):
            loss = self._engine(input_ids=batch.tokens_bT, labels=batch.labels_bT, shift_labels=batch.labels_bT).loss
            self._engine.backward(loss)
            self._engine.step()
            losses.append(loss.detach())
        self._count += 1
        return float(torch.stack(losses).mean())


def _measure_memory(report: Report) -> None:
    """Peak of a process that trains two steps of ours over that of a peer, the allocator as it comes; the worst counts.

    The peak is of all that is in memory, libraries too, and the same to 2 % from run to run. What the steps add to it
    moves by 10 %.
    """
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", "tests.bench.train_step", name], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name in (*OURS, *PEERS) if not name.endswith("bf16")
    }  # fmt: skip  # all at once: nothing is timed here
    peaks, ratios = dict[str, float](), dict[str, float]()
    for name, process in processes.items():
        said, complaints = process.communicate()
        if process.returncode:
            report.not_run(f"train_step/memory/{name}", complaints.strip().splitlines()[-1])
            continue
        added, peaks[name] = map(float, said.split()[-2:])
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
        step: Step = _Ours(MoEDecoder(shape, vocab_size=VOCAB), OURS[name])
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
