"""The whole method in one process without the engine, the loop or the hooks: plain torch on the full batch.

Everything the loop must agree with is written out here once more, as directly as the papers say it.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.schema import RunConfig
from moe.model import MoEDecoder
from moe.rules import RULES, Loads, RuleOptions, apply_rule
from tests.dist.plain_objective import PlainObjective
from trainer.data.corpus import TokenCorpus


def auxiliary_loss(config: RunConfig, model: MoEDecoder, tokens: Tensor) -> Tensor:
    """All auxiliary losses of the full batch, from the scores of each router: forward the model once more to see them."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    handles = [
        layer.router.register_forward_hook(lambda _, __, r: seen.append((r.scores_NE, r.logits_NE, r.indices_NK)))
        for layer in model.moe_layers()
    ]
    model(tokens)
    model.take_loads("train")
    for handle in handles:
        handle.remove()
    aux, total = config.model.aux_loss, torch.zeros(())
    top_k = config.model.top_k
    for scores, logits, indices in seen:
        experts = scores.shape[1]
        probabilities = scores / scores.sum(1, keepdim=True)
        share = torch.bincount(indices.flatten(), minlength=experts) / indices.numel()
        total = total + aux.global_batch * experts * (share * probabilities.mean(0)).sum()
        total = total + aux.z * logits.logsumexp(1).square().mean()
        by_sequence = zip(scores.chunk(len(tokens)), probabilities.chunk(len(tokens)), strict=True)
        for own_scores, own_probabilities in by_sequence:
            chosen = own_scores.topk(top_k).indices.flatten()
            own_share = torch.bincount(chosen, minlength=experts) / chosen.numel()
            total = total + aux.sequence * experts * (own_share * own_probabilities.mean(0)).sum() / len(tokens)
    return total


class Reference(NamedTuple):
    """What must be reproduced."""

    losses: list[float]
    """Of every step."""
    model: MoEDecoder
    """After the last one."""
    norms: list[float]
    """Of every step's gradient, before clipping."""


def train_reference(config: RunConfig, corpus: TokenCorpus) -> Reference:
    """Train, for any weights, balancing rule or auxiliary loss."""
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
    rule = RULES[config.hooks["expert_bias"]["rule"]]
    states: list[dict[str, Tensor]] = []
    for layer in model.moe_layers():
        layer.router.prepare_balancing(multiplicative=rule.multiplicative, collect_thresholds=rule.needs_thresholds, least_alpha=rule.least_alpha)
        states.append({name: torch.zeros(layer.num_experts) for name in rule.state})
    objective = PlainObjective(config, corpus)
    losses: list[float] = []
    norms: list[float] = []
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
        chosen: list[Tensor] = []
        handles = [
            layer.router.register_forward_hook(lambda _, __, routing: chosen.append(routing.indices_NK))  # noqa: B023
            for layer in model.moe_layers()
        ]
        penalty = torch.zeros(())
        if config.model.has_mtp:  # the block itself is compared with its definition in tests/moe
            token_losses, features, _ = model(batch.tokens_ST, batch.labels_ST, batch.documents_ST)
            penalty = features.mean()
        else:
            logits = model(batch.tokens_ST, None, batch.documents_ST)
            token_losses = F.cross_entropy(logits.transpose(1, 2), batch.labels_ST, reduction="none")
        for handle in handles:
            handle.remove()
        optimizer.zero_grad()
        loads = model.take_loads("train")
        if config.model.aux_loss.any:
            penalty = penalty + auxiliary_loss(config, model, batch.tokens_ST)
        (objective(batch, token_losses, step) + penalty).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)))
        optimizer.step()
        losses.append((token_losses.sum() / (batch.labels_ST != -100).sum()).item())
        for layer, stats, state, indices in zip(model.moe_layers(), loads, states, chosen, strict=True):
            router = layer.router
            counted = (batch.labels_ST != -100).flatten()
            load = torch.bincount(indices[counted].flatten(), minlength=layer.num_experts)
            if config.hooks["expert_bias"]["count"] == "weight":
                per_token = objective.token_coefficients_BT.flatten() * int((batch.labels_ST != -100).sum())
                load = torch.stack([per_token[(indices == e).any(1)].sum() for e in range(layer.num_experts)])
            low, high = router.threshold_range()
            share = router.top_k / router.num_experts
            bias, new_state = apply_rule(
                rule,
                Loads(load, stats.thresholds_EQ, low, high, share),
                router.expert_bias_E,
                state,
                n=step + 1,
                rate=config.hooks["expert_bias"]["rate"],
                options=RuleOptions(),
            )
            router.expert_bias_E.copy_(bias)
            state.update(new_state)
    return Reference(losses, model, norms)
