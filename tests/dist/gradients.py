"""The gradient of a step under the engine against plain autograd on the full batch.

As a job under torchrun: argv[1] is a JSON list of [config file, overrides], argv[2] where rank 0 writes the relative
error of each configuration, `||g - g_ref|| / ||g_ref||` over all parameters.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from configs.loader import load_run_config
from configs.schema import RunConfig
from launch._corpus import open_corpus
from launch.train import build, open_loader
from moe.model import MoEDecoder
from tests.dist.plain_objective import PlainObjective
from trainer import ranks
from trainer.accumulate import Accumulator
from trainer.data.corpus import TokenCorpus
from trainer.metrics import MetricBuffer
from trainer.process_group import leave, start_process_group, stop_process_group


def reference_gradients(config: RunConfig, corpus: TokenCorpus) -> dict[str, Tensor]:
    """Gradient of the first step's objective, one process, full batch, by parameter name."""
    torch.manual_seed(config.seed)
    model = MoEDecoder(config.model, vocab_size=corpus.vocab_size)
    batch = corpus.train_batch(np.arange(config.train.global_batch_size))
    logits = model(batch.tokens_ST, None, batch.documents_ST)
    token_losses = F.cross_entropy(logits.transpose(1, 2), batch.labels_ST, reduction="none")
    PlainObjective(config, corpus)(batch, token_losses, 0).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def engine_gradients(config: RunConfig, corpus: TokenCorpus) -> dict[str, Tensor]:
    """The same by the engine, complete on every rank but for sharded experts, of which it is this rank's share."""
    engine, hooks, run = build(config, corpus, Path(config.folder))
    accumulator = Accumulator(
        engine, hooks, mode=config.train.mode(needs_whole_step=hooks.needs_batch_losses),
        normalization=config.train.loss_normalization,
        num_micro_batches=config.train.global_batch_size
        // (config.train.micro_batch_size * config.engine.data_parallel(ranks.world_size())),
        samples_per_row=run.samples_per_row, device=run.device,
    )  # fmt: skip
    if run.is_frozen:  # as if a step had gone before; `linear` weights need no more than that
        _, state = hooks.state_dict()["sample_reweight"]
        hooks.load_state_dict({"sample_reweight": (2, state | {"frozen_steps": 1, "high": torch.tensor(6.0, dtype=torch.float64)})})
    batches = next(open_loader(config, corpus).batches(0))
    done = accumulator.run(batches, step=1, applied_steps=0, recorder=MetricBuffer())
    assert not done.skip_reason
    scale = 1.0 if done.gradient_scale is None else float(done.gradient_scale)
    found = {}
    for name, parameter in engine.module.named_parameters():
        gradient = parameter.grad if config.engine.zero_stage == 0 else safe_get_full_grad(parameter)
        if gradient is not None:
            found[name] = gradient.clone() * scale
    return found


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor], *, shares: int, share: int) -> float:
    """Over all parameters; of experts that are spread over `shares` ranks, over the `share` that is here."""
    assert found.keys() == expected.keys()
    wrong = total = 0.0
    for name, reference in expected.items():
        if reference.shape != found[name].shape:
            reference = reference.chunk(shares)[share]
        wrong += (found[name].double() - reference.double()).square().sum().item()
        total += reference.double().square().sum().item()
    return (wrong / total) ** 0.5


if __name__ == "__main__":
    start_process_group(60)
    errors = []
    for path, overrides in json.loads(sys.argv[1]):
        run_config = load_run_config(path, overrides, world_size=ranks.world_size())
        run_corpus = open_corpus(run_config)
        size = run_config.engine.expert_parallel_size
        errors.append(
            relative_error(
                engine_gradients(run_config, run_corpus), reference_gradients(run_config, run_corpus),
                shares=size, share=ranks.rank() % size,
            )
        )  # fmt: skip
    worst = ranks.all_reduce_(torch.tensor(errors, dtype=torch.float64), "max")
    if ranks.is_main():
        Path(sys.argv[2]).write_text(json.dumps(worst.tolist()))
    stop_process_group()
    leave(0)
