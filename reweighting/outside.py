"""Loss-based sample weights in anybody's training loop, exact over the whole global batch.

    weigher = SampleWeigher(strategy="linupper", temperature=0.5)
    ...losses of all samples of the optimizer step, from forwards without gradients...
    factors = weigher.weigh(losses, tokens)     # every rank's samples take part
    ...backward of (factors * losses).sum() for each micro-batch, optimizer step...
    weigher.step(applied=True)                  # False if the optimizer skipped the step

Weights depend on the losses of all samples of the step, so these must be known before the first backward: either by
forwarding the micro-batches twice, or, with a single micro-batch, by weighing between its forward and its backward.
Normalising by micro-batch or by rank would be another objective.

Shape letters: B samples of the optimizer step, S samples of this rank, b of a micro-batch, T sequence, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reweighting.hook import SampleReweightConfig, SampleReweightHook
from reweighting.temperature import TemperatureConfig
from trainer import ranks
from trainer.errors import ConfigError
from trainer.hooks import MetricReduction, MetricValue, RunContext, State, StateValue, StepContext, StepResult

_IGNORED_LABEL = -100


def sample_losses(logits_bTV: Tensor, labels_bT: Tensor, *, shifted: bool = False) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of each row's target tokens, float32 [b], 0 where there is none, and their number, int64 [b].

    Position t predicts label t + 1, as in causal models of transformers, or label t if `shifted`; -100 is no target.
    """
    if not shifted:
        logits_bTV, labels_bT = logits_bTV[:, :-1], labels_bT[:, 1:]
    losses_bT = F.cross_entropy(
        logits_bTV.float().flatten(0, 1), labels_bT.flatten(), ignore_index=_IGNORED_LABEL, reduction="none"
    ).view(labels_bT.shape)
    tokens_b = (labels_bT != _IGNORED_LABEL).sum(dim=1)
    return losses_bT.sum(dim=1) / tokens_b.clamp(min=1), tokens_b


class SampleWeigher:
    """The weights of one optimizer step after another: SampleReweightHook without its loop.

    `strategy`, and further `settings` such as cap, ess_floor, reference: see SampleReweightConfig. `temperature`: a
    number, or a TemperatureConfig whose clock is the applied steps. `normalization`: whether every token of a sample
    counts by the sample's weight (`tokens`; uniform weights are then the usual mean over tokens) or every sample
    whatever its length (`samples`). `total_steps`: length of the run, for temperatures that move over it; it may come
    later, by `start`, which is what the Trainer's mixin does.

    Raises ConfigError for settings that are inconsistent, or that need the project's own loop.
    """

    def __init__(
        self,
        *,
        strategy: str = "linupper",
        temperature: float | TemperatureConfig = 1.0,
        normalization: Literal["tokens", "samples"] = "tokens",
        total_steps: int = 0,
        **settings: Any,
    ) -> None:
        if isinstance(temperature, (int, float)):
            temperature = TemperatureConfig(value=temperature)
        for name in ("weigh", "frozen", "record_every", "show_documents"):
            if name in settings:
                raise ConfigError(f"weigher: {name} is for the project's own loop; remove it")
        try:
            config = SampleReweightConfig(
                strategy=strategy, temperature=temperature, record_every=0, show_documents=0, **settings
            )
        except TypeError as error:
            raise ConfigError(f"weigher: {error}") from error
        problems = config.problems()
        if normalization not in ("tokens", "samples"):
            problems.append(f"normalization: {normalization} must be tokens or samples")
        if problems:
            raise ConfigError(*(f"weigher: {line}" for line in problems))
        self.total_steps = total_steps
        self.metrics: dict[str, Tensor | float] = {}
        """Of the last step: loss (unweighted), loss/weighted, reweight/ess, reweight/max_weight and so on."""
        self._normalization = normalization
        self._needs_length = temperature.needs_length
        self._hook = SampleReweightHook(config)
        self._applied_steps = 0
        self._step: StepContext | None = None

    def start(self, *, total_steps: int) -> None:
        """A run of `total_steps` begins, or goes on; a step that was broken off is forgotten."""
        self.total_steps, self._step = total_steps, None

    @torch.no_grad()
    def weigh(self, losses_S: Tensor, tokens_S: Tensor) -> Tensor:
        """The factor of each of this rank's samples, float32 [S], in the order given. Call it on every rank.

        `losses_S`: mean losses of the samples of all micro-batches of this rank; `tokens_S`: their target tokens, 0 for
        a sample that is to be left out. Ranks may have different numbers of samples.

        The objective is the sum of factor * loss over a rank's samples, averaged over ranks, as DDP and DeepSpeed do
        with gradients: the number of ranks is in the factors.
        """
        if losses_S.shape != tokens_S.shape or losses_S.dim() != 1:
            raise ConfigError(
                f"weigher: got losses {tuple(losses_S.shape)}, tokens {tuple(tokens_S.shape)}; need one each"
            )
        if self._needs_length and self.total_steps < 1:
            raise ConfigError(
                "weigher: total_steps: a temperature that moves over the run needs its length: give the optimizer "
                "steps when the weigher is made, or to start(total_steps=...)"
            )
        if self._step is not None:
            raise ConfigError(
                "weigher: weigh was called twice for one step; call step(applied=...) after the optimizer"
            )
        losses_B, tokens_B, own_S, world_size = _gather(losses_S.detach(), tokens_S)
        self.metrics = {}
        zeros_B = torch.zeros_like(tokens_B)
        step = StepContext(
            step=self._applied_steps + 1, applied_steps=self._applied_steps,
            sample_ids_B=torch.arange(len(tokens_B), device=tokens_B.device), parts_B=zeros_B, domains_B=zeros_B,
            tokens_B=tokens_B, losses_B=torch.where(tokens_B > 0, losses_B, 0.0), own_S=own_S, recorder=self,
            _weights_owner=True,
        )  # fmt: skip
        self._hook.on_start(_run_context(self.total_steps, losses_S.device))
        self._hook.on_losses(step)
        assert step.weights_B is not None
        share_B = step.weights_B.double() * (tokens_B if self._normalization == "tokens" else 1)
        coefficients_B = share_B / share_B.sum().clamp(min=torch.finfo(torch.float64).tiny)
        self._step = replace(step, coefficients_B=coefficients_B)
        self.record("loss", (step.losses_B * tokens_B).sum() / tokens_B.sum().clamp(min=1))
        self.record("loss/weighted", (coefficients_B * step.losses_B).sum())
        return (coefficients_B[own_S] * world_size).float()

    def step(self, *, applied: bool) -> None:
        """The optimizer has moved, or skipped the step, which then leaves no trace in running statistics and schedules.

        `applied` must be the same on all ranks.
        """
        if self._step is None:
            raise ConfigError("weigher: step without weigh; weigh the samples of each step first")
        self._hook.after_step(self._step, StepResult(applied=applied, reason="" if applied else "skipped"))
        self._applied_steps += int(applied)
        self._step = None

    def record(self, name: str, value: MetricValue, reduction: MetricReduction = "same") -> None:
        """Where the hook puts its numbers; they stay on the device."""
        assert not isinstance(value, list)
        self.metrics[name] = value

    def state_dict(self) -> State:
        """Running statistics and the number of applied steps; identical on every rank."""
        return self._hook.state_dict() | {"applied_steps": self._applied_steps}

    def load_state_dict(self, state: Mapping[str, StateValue]) -> None:
        """Take back what `state_dict` gave; lists, as JSON has them, are taken for tensors."""
        own = {
            key: torch.tensor(value, dtype=torch.float64) if isinstance(value, (list, float)) else value
            for key, value in state.items()
        }
        self._applied_steps = int(own.pop("applied_steps"))
        self._hook.load_state_dict(own)


def _gather(losses_S: Tensor, tokens_S: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Losses (float64) and tokens of all ranks, [B], where this rank's samples are among them, [S], and how many ranks.

    Ranks with fewer samples are filled up with samples without tokens, which enter nothing.
    """
    most = int(ranks.all_reduce_(torch.tensor(len(losses_S), device=losses_S.device), "max"))
    own_2S = torch.stack([losses_S.double(), tokens_S.double()])
    all_W2S = ranks.all_gather(F.pad(own_2S, (0, most - len(losses_S))))
    own = ranks.rank() * most if ranks.is_distributed() else 0
    losses_B, tokens_B = all_W2S.transpose(0, 1).flatten(1)
    return losses_B, tokens_B.long(), torch.arange(own, own + len(losses_S), device=losses_S.device), len(all_W2S)


def _run_context(total_steps: int, device: torch.device) -> RunContext:
    """What the hook may know of a run that is not ours: its length, and that weights are exact."""
    return RunContext(
        model=nn.Identity(), total_steps=total_steps, global_batch_size=0, domain_names=("all",), domain_shares=(1.0,),
        run_dir=Path(), device=device, seed=0, samples_per_row=1, has_weights=True, is_frozen=False,
        excerpts=lambda _: [],
    )  # fmt: skip
