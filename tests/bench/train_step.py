"""`train_step`: tokens a second of a whole optimizer step against transformers under DeepSpeed.

One GLM-4-MoE of four layers in both, with the same weights, batches, ZeRO stage, fused AdamW and clipping. Theirs is
in its best setting: grouped products, scaled-dot-product attention, a bare loop instead of Trainer. Ours has the bias
hook. The losses of the first step are compared before anything is timed.
"""

import torch

from moe.bias_hook import ExpertBiasConfig, ExpertBiasHook
from moe.config import ModelConfig
from moe.model import MoEDecoder
from tests.bench.group import join_process_group
from tests.bench.report import Report
from tests.bench.timing import interleaved
from tests.moe.test_bias_hook import run_of
from tests.moe.test_parity import copy_weights
from trainer.accumulate import Accumulator
from trainer.data.loader import MicroBatch
from trainer.engine import Engine
from trainer.engine_choices import zero_table
from trainer.engine_config import EngineConfig
from trainer.hooks import HookList, StepResult
from trainer.metrics import MetricBuffer
from trainer.optim import OptimizerConfig, build_adamw

VOCAB, SEQUENCE, MICRO_BATCH, MICRO_BATCHES, LEARNING_RATE = 4096, 256, 4, 2, 1e-4
ENGINE = EngineConfig(zero_stage=1, precision="fp32")
OPTIMIZER = OptimizerConfig(learning_rate=LEARNING_RATE)


def measure(report: Report, rounds: int = 4) -> None:
    """Ratio of tokens a second, ours over theirs."""
    import transformers

    torch.manual_seed(0)
    theirs = transformers.Glm4MoeForCausalLM(
        transformers.Glm4MoeConfig(
            vocab_size=VOCAB, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4, head_dim=32, partial_rotary_factor=1.0, rms_norm_eps=1e-5, attention_bias=False,
            use_qk_norm=True, n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=256,
            n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1, routed_scaling_factor=1.0,
            norm_topk_prob=True, tie_word_embeddings=False, max_position_embeddings=SEQUENCE,
            experts_implementation="grouped_mm", attn_implementation="sdpa", use_cache=False,
        )
    )  # fmt: skip
    ours = MoEDecoder(
        ModelConfig(
            hidden_size=256, num_layers=4, num_dense_layers=1, dense_intermediate_size=704, num_heads=8, num_kv_heads=4,
            head_dim=32, num_experts=16, top_k=2, expert_intermediate_size=256, num_shared_experts=1,
            router_score="sigmoid", normalize_gates=True, qk_norm=True, norm_eps=1e-5,
            rope_theta=theirs.config.rope_parameters["rope_theta"],
        ),
        vocab_size=VOCAB,
    )  # fmt: skip
    copy_weights(ours, theirs)
    join_process_group()
    steps = {"ours": _Ours(ours), "theirs": _Theirs(theirs)}
    losses = {name: float(step()) for name, step in steps.items()}
    assert abs(losses["ours"] - losses["theirs"]) < 1e-4 * losses["ours"], losses
    times = interleaved(dict(steps), rounds=rounds, warm_up=2)
    report.add(
        "train_step/tokens_ratio",
        times["theirs"].median / times["ours"].median,
        times["theirs"].minimum / times["ours"].minimum,
        note="transformers under DeepSpeed, ZeRO 1",
    )


def _batches(step: int) -> list[MicroBatch]:
    """The micro-batches of a step, the same for both."""
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

    def __init__(self, model: MoEDecoder) -> None:
        optimizer = build_adamw(model, OPTIMIZER, torch.device("cpu"))
        self._engine = Engine(
            model, optimizer, ENGINE, micro_batch_size=MICRO_BATCH, clip_norm=OPTIMIZER.clip_norm
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
        self._engine.step(LEARNING_RATE, done.gradient_scale)
        self._hooks.after_step(done.context, StepResult(applied=True, reason=""))
        self._count += 1
        assert done.loss is not None
        return done.loss


class _Theirs:
    """A step of transformers' model under DeepSpeed, as its documentation has it."""

    def __init__(self, model: torch.nn.Module) -> None:
        import deepspeed

        table = zero_table(ENGINE, sum(p.numel() for p in model.parameters()), world_size=1)
        settings = ENGINE.deepspeed_dict(
            micro_batch_size=MICRO_BATCH, clip_norm=OPTIMIZER.clip_norm, zero_table=table
        )  # fmt: skip
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
