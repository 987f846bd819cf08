"""The weighted objective of a step once more, as directly as the papers say it: full batch, loops, no shared code.

What is covered: strategies on the step's minimum and maximum or quantiles, rows or documents, token weights, domain
weights fixed or after DoReMi, normalisation by samples or tokens.
"""

import math
from typing import Any

import torch
from torch import Tensor

from configs.schema import RunConfig
from trainer.data.corpus import Rows, TokenCorpus

SCORES = {
    "linupper": lambda h: torch.clamp(h + 1, max=1),
    "quadratic": lambda h: 1 - h**2,
    "extremes": lambda h: h.abs(),
    "uniform": lambda h: 0 * h,
}


class PlainObjective:
    """Keeps what DoReMi carries from step to step."""

    def __init__(self, config: RunConfig, corpus: TokenCorpus) -> None:
        self._config, self._corpus = config, corpus
        self._hooks = {name: options for name, options in config.hooks.items() if options["enabled"]}
        self._domains = self._hooks.get("domain_reweight")
        if self._domains is not None:
            names = corpus.domain_names
            alpha = torch.tensor([self._domains["weights"].get(name, 1.0) for name in names], dtype=torch.float64)
            self._alpha = alpha / alpha.sum()
        self._excess = dict.fromkeys(range(len(corpus.domain_names)), 0.0)
        self.token_coefficients_BT = torch.empty(0)
        """Weight of each token's loss in the last objective, without token weights."""

    def __call__(self, batch: Rows, token_losses_BT: Tensor, step: int) -> Tensor:
        """The scalar to differentiate. `step` counts from 0."""
        samples = self._samples(batch)
        counted = batch.labels_ST != -100
        means = [token_losses_BT[row][own].detach().double().mean() for row, own in samples]
        weights = self._weights(torch.stack(means), step)
        numerators = []
        for (row, own), weight in zip(samples, weights, strict=True):
            numerators.append(weight * self._factor(int(batch.domains_S[row])))
            if self._config.train.loss_normalization == "tokens":
                numerators[-1] = numerators[-1] * int(own.sum())
        total = sum(numerators)
        token_weights = self._token_weights(token_losses_BT.detach())
        mean_token_weight = token_weights[counted].mean()
        objective = torch.zeros(())
        self.token_coefficients_BT = torch.zeros(token_losses_BT.shape, dtype=torch.float64)
        for (row, own), numerator in zip(samples, numerators, strict=True):
            loss = (token_weights[row][own] * token_losses_BT[row][own]).sum() / own.sum()
            objective = objective + float(numerator / total) * loss / mean_token_weight
            self.token_coefficients_BT[row][own] = float(numerator / total) / int(own.sum())
        self._move_domains(batch, token_losses_BT.detach())
        return objective

    def _samples(self, batch: Rows) -> list[tuple[int, Tensor]]:
        """(row, mask of its target tokens) for each sample that has any."""
        by_document = self._hooks.get("sample_reweight", {}).get("weigh") == "documents"
        found = []
        for row, (labels, documents) in enumerate(zip(batch.labels_ST, batch.documents_ST, strict=True)):
            for number in documents.unique().tolist() if by_document else [None]:
                own = labels != -100
                if number is not None:
                    own = own & (documents == number)
                if own.any():
                    found.append((row, own))
        return found

    def _weights(self, losses: Tensor, step: int) -> Tensor:
        options: dict[str, Any] | None = self._hooks.get("sample_reweight")
        if options is None:
            return torch.full_like(losses, 1 / len(losses))
        schedule = options["temperature"]
        r = schedule["warmup_value"] if step < schedule["warmup_steps"] else schedule["value"]
        if options["strategy"] == "linear":
            return torch.softmax(losses / r, dim=0)
        q = options["reference"]["quantile"] if options["reference"]["kind"] == "quantile" else 0.0
        low, high = torch.quantile(losses, q), torch.quantile(losses, 1 - q)
        h = (2 * (losses - low) / (high - low) - 1).clamp(-1, 1)
        return torch.softmax(SCORES[options["strategy"]](h) / r, dim=0)

    def _token_weights(self, losses_BT: Tensor) -> Tensor:
        options = self._hooks.get("token_reweight")
        if options is None:
            return torch.ones_like(losses_BT)
        p = torch.exp(-losses_BT.double())
        if options["strategy"] == "focal":
            return ((1 - p) ** options["gamma"]).float()
        return (p ** options["b1"] * (1 - p) ** options["b2"]).float()

    def _factor(self, domain: int) -> float:
        if self._domains is None:
            return 1.0
        return float(self._alpha[domain]) / self._corpus.domain_shares[domain]

    def _move_domains(self, batch: Rows, losses_BT: Tensor) -> None:
        if self._domains is None or self._domains["rule"] != "doremi":
            return
        for domain, name in enumerate(self._corpus.domain_names):
            own = (batch.labels_ST != -100) & (batch.domains_S == domain).unsqueeze(1)
            if own.any():  # else the domain keeps the excess it had
                self._excess[domain] = max(
                    float(losses_BT[own].double().mean()) - self._domains["reference_losses"][name], 0.0
                )
            self._alpha[domain] *= math.exp(self._domains["eta"] * self._excess[domain])
        smoothing = self._domains["smoothing"]
        self._alpha = (1 - smoothing) * self._alpha / self._alpha.sum() + smoothing / len(self._alpha)
