"""What a training step reports: loss, domains, speed, under the metric names everybody shares.

Values stay on the device until `flush`, which need not wait for it: the host can prepare the next step meanwhile.

Shape letters: B samples of the step, D domains.
"""

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer import phases, ranks
from trainer.gpu_peaks import peak_flops
from trainer.hooks import StepContext, StepResult
from trainer.metrics import MetricBuffer, Parcel
from trainer.phases import OTHER, Marks, PhaseClock
from trainer.train_state import TrainState

_EMA_DECAY = 0.98  # of `loss/ema`: a display aid with a memory of about 50 steps


class StepTelemetry:
    """Records one row of metrics a step."""

    def __init__(
        self,
        state: TrainState,
        domain_names: Sequence[str],
        *,
        flops_per_token: float,
        precision: str,
        device: torch.device,
    ) -> None:
        """`flops_per_token`: model FLOPs of forward and backward for one target token, for MFU."""
        self.buffer = MetricBuffer()
        self._domain_names = tuple(domain_names)
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops(device, precision)
        self._device = device
        self.clock = PhaseClock(device)
        self._marks: list[Marks] = []
        self._sent: deque[tuple[Parcel, list[Marks]]] = deque()
        self._tokens = torch.tensor(float(state.tokens), dtype=torch.float64, device=device)
        self._loss_ema = self._average_in(state)
        self._began = 0.0

    def start_step(self) -> None:
        """The step's clock starts, before data is asked for."""
        self._began = time.perf_counter()
        self.clock.start()

    def data_is_here(self) -> None:
        """The micro-batches have arrived."""
        self.clock.switch(OTHER)

    def record_step(
        self,
        state: TrainState,
        context: StepContext,
        coefficients_B: Tensor,
        result: StepResult,
        *,
        learning_rate: float,
        grad_norm: Tensor | float,
    ) -> None:
        """Close the row of the step that `state` has just counted."""
        losses_B, tokens_B = context.losses_B.double(), context.tokens_B.double()
        num_tokens = tokens_B.sum()
        loss = (losses_B * tokens_B).sum() / num_tokens
        self._tokens += num_tokens
        if result.applied:
            self._loss_ema = torch.where(
                self._loss_ema.isnan(), loss, _EMA_DECAY * self._loss_ema + (1 - _EMA_DECAY) * loss
            )
        record = self.buffer.record
        record("step", state.step)
        record("tokens", self._tokens.clone())
        record("samples", state.samples)
        record("loss", loss)
        record("loss/weighted", (losses_B * coefficients_B).sum())
        record("loss/ema", self._loss_ema)
        record("lr", learning_rate)
        record("grad_norm", grad_norm)
        record("step/applied", int(result.applied))
        self._record_domains(context, losses_B, tokens_B, coefficients_B)
        self._record_speed(num_tokens)
        self.buffer.close_step()

    def flush(self, *, wait: bool) -> list[dict[str, Any]]:
        """Rows of the steps since the last flush, as host numbers, in order.

        Without `wait` only those that are on the host already: on CUDA the last ones come with a later flush.
        """
        self._sent.append((self.buffer.send(), self._marks))
        self._marks = []
        rows = []
        while self._sent and (wait or self._sent[0][0].is_here):
            parcel, marks = self._sent.popleft()
            # The device has passed the copy, so all events of its steps have happened.
            rows += [row | phases.metrics(of_step) for row, of_step in zip(parcel.open(), marks, strict=True)]
        return rows

    def store_totals(self, state: TrainState) -> None:
        """Bring the running totals, which live on the device, into what a checkpoint saves."""
        ema = float(self._loss_ema)
        state.tokens = int(self._tokens)
        state.loss_ema = None if math.isnan(ema) else ema

    def restore_average(self, state: TrainState) -> None:
        """Take the average loss that a checkpoint holds."""
        self._loss_ema = self._average_in(state)

    def _average_in(self, state: TrainState) -> Tensor:
        ema = math.nan if state.loss_ema is None else state.loss_ema
        return torch.tensor(ema, dtype=torch.float64, device=self._device)

    def _record_domains(self, context: StepContext, losses_B: Tensor, tokens_B: Tensor, coefficients_B: Tensor) -> None:
        columns_B3 = torch.stack([losses_B * tokens_B, tokens_B, coefficients_B], dim=1)
        sums_D3 = columns_B3.new_zeros(len(self._domain_names), 3).index_add_(0, context.domains_B, columns_B3)
        for name, (loss_sum, tokens, weight) in zip(self._domain_names, sums_D3, strict=True):
            self.buffer.record(f"domain/{name}/loss", loss_sum / tokens)  # NaN, written as null, in a step without it
            self.buffer.record(f"domain/{name}/weight", weight)
            self.buffer.record(f"domain/{name}/tokens", tokens)

    def _record_speed(self, num_tokens: Tensor) -> None:
        step_s = time.perf_counter() - self._began
        self._marks.append(self.clock.stop())
        tokens_per_s = num_tokens / step_s
        record = self.buffer.record
        record("time/step_s", step_s)
        record("tokens_per_s", tokens_per_s)
        if self._peak_flops is not None:
            record("mfu", tokens_per_s * self._flops_per_token / (self._peak_flops * ranks.world_size()))
        record("memory/gib", _peak_memory_bytes(self._device) / 2**30)


def _peak_memory_bytes(device: torch.device) -> int:
    """Highest memory use so far: of the accelerator's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
