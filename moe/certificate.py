"""The balance certificate: proof, while a run goes on, that balancing is alive and counts what it claims to count.

Public implementations have balanced nothing for a whole run (a hook never registered), counted twice under
recomputation, counted padding or evaluation, or moved biases on skipped steps, all silently. Each of these breaks one
of the statements below; they are checked at every step on the device, and read where the run evaluates.

Shape letters: E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer import ranks
from trainer.errors import NumericError


class BalanceCertificate:
    """Watches the loads and biases of a run. Nothing waits for the device before `verify`."""

    def __init__(self, model: nn.Module, biases: Sequence[Tensor], top_k: Sequence[int]) -> None:
        """`biases` and `top_k`: of every balanced layer; `model`: where all of them must come from."""
        self._top_k = torch.tensor(top_k, device=biases[0].device)
        self._biases = list(biases)
        self._in_model = sum(name.endswith("expert_bias_E") for name, _ in model.named_buffers())
        self._miscounted = torch.zeros((), dtype=torch.int64, device=biases[0].device)
        self._disturbed = torch.zeros((), dtype=torch.int64, device=biases[0].device)
        self._expected: Tensor | None = None  # a resumed run may begin with biases that are not zero

    def observe_loads(self, counts: Sequence[Tensor], num_tokens: Tensor) -> None:
        """Loads of an accumulated step, summed over ranks: each layer's must be tokens x k, exactly."""
        sums = torch.stack([counts_E.sum() for counts_E in counts])
        self._miscounted += (sums != num_tokens * self._top_k).sum()

    def before_move(self) -> None:
        """The hook is about to move the biases: until now nobody may have touched them."""
        if self._expected is not None:
            self._disturbed += (torch.cat(self._biases) != self._expected).sum()

    def after_move(self) -> None:
        """The hook has moved the biases, or left them where they are because the step was skipped."""
        self._expected = torch.cat(self._biases).clone()

    def verify(self, step: int) -> None:
        """Check every statement; a collective.

        Raises NumericError that names the first statement that does not hold.
        """
        if len(self._biases) != self._in_model:
            raise NumericError(
                f"balance certificate, step {step}: {len(self._biases)} of {self._in_model} MoE layers are balanced"
            )
        if any(bias_E.dtype != torch.float32 for bias_E in self._biases):
            raise NumericError(f"balance certificate, step {step}: a bias is not float32")
        biases = torch.cat(self._biases)
        if int(self._miscounted):
            raise NumericError(
                f"balance certificate, step {step}: loads are not tokens x k in {int(self._miscounted)} layers and "
                "steps; tokens are counted twice, or not at all"
            )
        if int(self._disturbed):
            raise NumericError(f"balance certificate, step {step}: something besides its hook has moved a bias")
        everywhere = ranks.all_gather(biases)
        if not bool((everywhere == everywhere[0]).all()):
            raise NumericError(f"balance certificate, step {step}: biases differ between ranks")
