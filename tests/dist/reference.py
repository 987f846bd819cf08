"""The whole method in one process without the engine, the loop or the hooks: plain torch on the full batch.

Everything the loop must agree with is written out here once more, as directly as the papers say it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.schema import RunConfig
from moe.model import MoEDecoder
from trainer.data.corpus import TokenCorpus


def linupper_weights(losses: Tensor, temperature: float) -> Tensor:
    h = 2 * (losses - losses.min()) / (losses.max() - losses.min()) - 1
    return torch.softmax(torch.clamp(h + 1, max=1) / temperature, dim=0)


def train_reference(config: RunConfig, corpus: TokenCorpus) -> tuple[list[float], MoEDecoder]:
    """Losses of every step and the trained model, for linupper weights and the sign rule."""
    train = config.train
    torch.manual_seed(config.seed)
    model = MoEDecoder(config.model, vocab_size=corpus.vocab_size)
    embedding = model.embedding.weight
    matrices = [p for p in model.parameters() if p.ndim >= 2 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim < 2 or p is embedding]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps,
    )
    reweight = config.hooks["sample_reweight"]["temperature"]
    losses = []
    for step in range(train.steps):
        warmup = config.schedule.warmup_steps
        if step < warmup:
            rate = (step + 1) / warmup
        else:
            progress = (step - warmup + 1) / (train.steps - warmup)
            rate = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.learning_rate * rate
        ids = torch.arange(step * train.global_batch_size, (step + 1) * train.global_batch_size)
        batch = corpus.train_batch(ids.numpy())
        logits = model(batch.tokens_ST)
        token_losses = F.cross_entropy(logits.transpose(1, 2), batch.labels_ST, reduction="none")
        sample_losses = token_losses.mean(dim=1)
        r = reweight["warmup_value"] if step < reweight["warmup_steps"] else reweight["value"]
        weights = linupper_weights(sample_losses.detach(), r)
        optimizer.zero_grad()
        (weights * sample_losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        losses.append(float(sample_losses.mean()))
        for layer, counts in zip(model.moe_layers(), model.take_counts("train"), strict=True):
            error = counts.double().mean() - counts.double()
            layer.router.expert_bias_E += config.hooks["expert_bias"]["rate"] * error.sign().float()
    return losses, model
