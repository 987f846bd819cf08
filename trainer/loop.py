"""The training loop: each stage of an optimizer step by name, in the order the data meets them.

    batch -> token losses -> sample losses -> weights -> backward -> step -> hooks -> metrics -> evaluate -> checkpoint

Decisions:
- A skipped step (a loss or gradient that is not finite) consumes its samples and changes nothing else: no
  parameter, optimizer moment, learning-rate clock, expert bias or average moves.
- Schedules run on `applied_steps`, the data and the end of the run on attempted steps.
- Stopping (SIGTERM) is agreed by all ranks inside the step's own collective, then saved. So is the failure of a
  checkpoint that a thread was writing.
- Going back after loss spikes turns the steps since a checkpoint into skipped ones: counters of data go on, weights,
  optimizer and hooks return, and so does the mixture that a hook had asked for (trainer/spikes.py).
- A change of the data's mixture that a hook asks for acts a fixed number of steps later (trainer/data/online.py).
- Evaluation comes before the checkpoint of the same step, so that a checkpoint implies its metrics are written.
- Python's garbage is collected after a step, at the same ones on every rank (trainer/garbage.py).
"""

import logging
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

from torch import Tensor

from trainer import ranks
from trainer.accumulate import AccumulationMode, Accumulator
from trainer.checkpoint import CheckpointConfig, CheckpointStore
from trainer.data.config import MORE_HELDOUT
from trainer.data.corpus import TokenCorpus
from trainer.data.loader import MicroBatch, TrainLoader
from trainer.data.online import OnlinePlan
from trainer.engine import Engine
from trainer.errors import NumericError
from trainer.evaluate import EvaluationConfig, evaluate
from trainer.garbage import StepGarbage
from trainer.global_batch import Signals
from trainer.hooks import EvaluationContext, HookList, PhaseContext, RunContext, StepResult, StopReason
from trainer.metrics import MetricBuffer
from trainer.profiling import StepProfiler
from trainer.spikes import SpikeConfig, SpikeWatch
from trainer.telemetry import StepTelemetry
from trainer.train_state import TrainState

log = logging.getLogger("evenkeel")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimizer steps of a run."""

    steps: int = 1000
    """Optimizer steps to attempt."""
    global_batch_size: int = 64
    """Samples of one optimizer step, over all ranks and micro-batches."""
    micro_batch_size: int = 8
    """Samples one rank forwards at once."""
    sequence_length: int = 1024
    """Tokens a sample."""
    loss_normalization: Literal["samples", "tokens"] = "tokens"
    """What the loss averages over: every sample alike, or every target token alike."""
    accumulation: Literal["auto", "deferred", "two_pass", "frozen"] = "auto"
    """How weights get to know all losses before the backward. `deferred`: keep every micro-batch's graph; `two_pass`:
    forward twice; `auto`: keep as many graphs as measured memory allows, forward the others twice (and neither if no
    hook needs losses); `frozen`: weigh by statistics of earlier steps, without waiting."""
    max_skipped_in_a_row: int = 10
    """Skipped steps in a row that end the run (exit 4)."""
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    """Steps whose loss stands out."""
    write_every: int = 1
    """Steps whose metrics are copied from the device and written together."""
    verify_every: int = 100
    """Steps between checks that ranks still hold the same parameters, buffers and hook state, which every save makes
    too; 0 leaves it to the saves."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        for name in (
            "steps",
            "global_batch_size",
            "micro_batch_size",
            "sequence_length",
            "max_skipped_in_a_row",
            "write_every",
        ):
            if getattr(self, name) < 1:
                found.append(f"{name}: {getattr(self, name)} must be at least 1")
        found += [f"spikes.{line}" for line in self.spikes.problems()]
        if self.spikes.policy == "rewind" and self.spikes.patience > self.max_skipped_in_a_row:
            found.append(
                f"spikes.patience: the run ends after max_skipped_in_a_row ({self.max_skipped_in_a_row}) spikes in a "
                f"row, before {self.spikes.patience} could make it go back; raise that or lower this"
            )
        if self.verify_every < 0:
            found.append(f"verify_every: {self.verify_every} is negative; use 0 to compare ranks only at checkpoints")
        return found

    def mode(self, *, needs_whole_step: bool, keeps_graphs: bool = True) -> AccumulationMode:
        """How this run accumulates, given whether hooks or the model must see the whole step before a backward, and
        whether the engine lets graphs wait for it."""
        if self.accumulation != "auto":
            return self.accumulation
        if not needs_whole_step:
            return "streaming"
        return "auto" if keeps_graphs else "two_pass"

    def batch_problems(self, world_size: int) -> list[str]:
        """Why the global batch cannot be dealt to `world_size` ranks with samples of their own; empty if it can."""
        unit = self.micro_batch_size * world_size
        if unit < 1 or self.global_batch_size % unit == 0:
            return []
        return [
            f"global_batch_size: {self.global_batch_size} is not divisible by micro_batch_size x ranks = "
            f"{self.micro_batch_size} x {world_size} = {unit}; change one of them"
        ]


class StopSignal:
    """Remembers that SIGTERM or SIGUSR1 (Slurm's warning) came, so that the loop can end between two steps."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> Callable[[], None]:
        """Start listening; returns what restores the previous handler."""
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGUSR1)}

        def restore() -> None:
            for number, handler in previous.items():
                signal.signal(number, handler)

        return restore

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


@dataclass(kw_only=True)
class Trainer:
    """One run: the parts, and the loop that moves data through them."""

    config: TrainConfig
    engine: Engine
    hooks: HookList
    run: RunContext
    corpus: TokenCorpus
    loader: TrainLoader
    learning_rate: Callable[[int], float]
    """Learning rate as a function of the steps applied so far."""
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    store: CheckpointStore
    telemetry: StepTelemetry
    profiler: StepProfiler
    write: Callable[[Sequence[Mapping[str, Any]]], None]
    """Takes finished rows of metrics, on every rank; only rank 0 need do something."""
    state: TrainState
    stop: StopSignal

    def __post_init__(self) -> None:
        self._accumulator = Accumulator(
            self.engine,
            self.hooks,
            mode=self.config.mode(
                needs_whole_step=self.hooks.needs_batch_losses
                or getattr(self.engine.module, "needs_whole_step", False),
                keeps_graphs=self.engine.config.keeps_graphs,
            ),
            normalization=self.config.loss_normalization,
            num_micro_batches=self.config.global_batch_size
            // (self.config.micro_batch_size * self.engine.config.data_parallel(ranks.world_size())),
            samples_per_row=self.run.samples_per_row,
            device=self.run.device,
            clock=self.telemetry.clock,
        )
        self._spikes = SpikeWatch(self.config.spikes, self.state)
        self._phase = -1  # the one that hooks know

    def train(self) -> StopReason:
        """Train from `state` to the last step or to SIGTERM. Every hook's `on_stop` is called, whatever happens."""
        reason: StopReason = "error"
        restore_signal = self.stop.install()
        try:
            self.engine.module.train()
            if not self.corpus.has_heldout_text and ranks.is_main():
                log.warning("no document is held out, so there will be no held-out loss; %s", MORE_HELDOUT)
            if self.state.step == 0:
                self._evaluate()
                self._change_sampling()
            with closing(self.loader.batches(self.state.step)) as batches, StepGarbage() as garbage:
                reason = self._steps(batches, garbage)
            return reason
        finally:
            restore_signal()
            if reason == "error":
                self.store.leave()
            # After an error other ranks may be gone: hooks are told, and nothing here may wait for anybody.
            self.hooks.on_stop(reason)
            self.profiler.close()

    def _steps(self, batches: Iterator[list[MicroBatch]], garbage: StepGarbage) -> StopReason:
        state, config = self.state, self.config
        while state.step < config.steps:
            self.profiler.start_step(state.step + 1)
            self.telemetry.start_step()
            micro_batches = next(batches)
            self.telemetry.data_is_here()
            self._enter_phase()

            signals = self._step(micro_batches)
            self.profiler.end_step(state.step)
            last = signals.stop or state.step == config.steps
            evaluates = state.step == config.steps or _due(state.step, self.evaluation.every)
            saves = last or _due(state.step, self.checkpoint.every)
            verifies = _due(state.step, config.verify_every)
            # What follows may end the run, or writes what must come after this step's row.
            wait = bool(saves or verifies or evaluates or signals.save_failed or state.skipped_in_a_row)
            if wait or state.step % config.write_every == 0:
                self.write(self.telemetry.flush(wait=wait))
            if signals.save_failed:
                self.store.finish()  # raises, on every rank, what went wrong on one
            rewinds = self._spikes.asks_to_rewind and self._rewind()  # which saves
            if state.skipped_in_a_row >= config.max_skipped_in_a_row:
                self.store.finish()
                raise NumericError(
                    f"step {state.step}: {state.skipped_in_a_row} steps in a row were skipped; the last checkpoint is "
                    "intact: lower the learning rate or look at the samples named in log.txt, then start again"
                )
            if verifies and not saves and not rewinds:  # which do it themselves
                self._note_plan()
                self.store.refuse_divergence(self.engine, self.hooks, state)
            if evaluates:
                self._evaluate()
            if saves and not rewinds:
                self._save(wait=last)
            garbage.after_step(state.step, paused=evaluates or saves or rewinds)
            if signals.stop and state.step < config.steps:
                return "preempted"
        return "done"

    def _step(self, micro_batches: Sequence[MicroBatch]) -> Signals:
        """One optimizer step. Returns what ranks had to tell."""
        state, clock = self.state, self.telemetry.clock
        learning_rate = self.learning_rate(state.applied_steps)
        accumulated = self._accumulator.run(
            micro_batches,
            step=state.step + 1,
            applied_steps=state.applied_steps,
            recorder=self.telemetry.buffer,
            signals=Signals(stop=self.stop.requested, save_failed=self.store.has_failed),
            judge=self._spikes.judge,
        )
        if accumulated.skip_reason:
            result = StepResult(applied=False, reason=accumulated.skip_reason)
            grad_norm: Tensor | float = math.nan
        else:
            with clock.phase("hooks"):
                self.hooks.before_step(accumulated.context)
            with clock.phase("optimizer"):
                applied, grad_norm = self.engine.step(learning_rate, accumulated.gradient_scale)
            result = StepResult(applied=applied, reason="" if applied else "gradient is not finite")
            if applied:
                self._accumulator.budget.settle()
        with clock.phase("hooks"):
            self.hooks.after_step(accumulated.context, result)

        state.step += 1
        state.samples += self.config.global_batch_size
        state.applied_steps += result.applied
        state.skipped_in_a_row = 0 if result.applied else state.skipped_in_a_row + 1
        self._spikes.note(accumulated.loss, is_spike=accumulated.is_spike)
        if accumulated.is_spike and result.applied and ranks.is_main():
            log.warning("step %d: loss %.4f is a spike", state.step, accumulated.loss)
        self.telemetry.buffer.record("step/spike", int(accumulated.is_spike))
        self._change_sampling()
        if not result.applied and ranks.is_main():
            first = state.samples - self.config.global_batch_size
            log.warning(
                "step %d skipped: %s (samples %d to %d); nothing was changed",
                *(state.step, result.reason, first, state.samples - 1),
            )
        self.telemetry.record_step(
            state,
            accumulated.context,
            accumulated.coefficients_B,
            result,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
        )
        return accumulated.signals

    def _enter_phase(self) -> None:
        """Tell hooks, log and metrics which mixture the coming step is of."""
        step = self.state.step
        phase = self.corpus.plan.phase((step + 1) * self.config.global_batch_size - 1)
        self.telemetry.buffer.record("data/phase", phase.number)
        if phase.number == self._phase:
            return
        self._phase = phase.number
        self.hooks.on_phase(PhaseContext(number=phase.number, first_sample=phase.start, domain_shares=phase.shares_D))
        if ranks.is_main():
            shares = zip(self.corpus.domain_names, phase.shares_D, strict=True)
            mixture = ", ".join(f"{name} {share:.1%}" for name, share in shares if share)
            # A hook may change the sampling at every step: the file has them all, the screen need not.
            level = logging.DEBUG if isinstance(self.corpus.plan, OnlinePlan) else logging.INFO
            log.log(
                level, "step %d: data phase %d, from sample %d: %s (%s)",
                step + 1, phase.number, phase.start, mixture, phase.cause,
            )  # fmt: skip

    def _change_sampling(self) -> None:
        """Ask the owner of the sampling for a new mixture."""
        weights_D = self.hooks.sampling_weights()
        if weights_D is not None:
            plan = self.corpus.plan
            assert isinstance(plan, OnlinePlan), "a run whose hooks set the sampling opens the corpus for it"
            plan.change(weights_D, steps_done=self.state.step)

    def _evaluate(self) -> None:
        if not self.corpus.has_heldout_text:
            return
        heldout = evaluate(
            self.engine.module,
            self.corpus,
            self.evaluation,
            batch_size=self.config.micro_batch_size,
            device=self.run.device,
            sharing=self.engine.config.sequence_parallel_size,
            after_domain=self.hooks.on_evaluate_domain,
        )
        buffer = MetricBuffer()
        buffer.record("step", self.state.step)
        for name, value in heldout.metrics().items():
            buffer.record(name, value)
        self.hooks.on_evaluate(EvaluationContext(step=self.state.step, tokens=heldout.tokens, recorder=buffer))
        buffer.close_step()
        self.write(buffer.flush())

    def _save(self, *, wait: bool) -> None:
        self.telemetry.store_totals(self.state)
        self._note_plan()
        self.store.save(self.engine, self.hooks, self.state, wait=wait)

    def _note_plan(self) -> None:
        self.state.plan = self.corpus.plan.state_dict(self.state.samples)

    def _rewind(self) -> bool:
        """Take weights, optimizer and hooks back to a checkpoint from before the spikes; the data goes on.

        False if there is none: then the spikes remain skipped steps.
        """
        state, config = self.state, self.config.spikes
        first_spike = state.step - state.spikes_in_a_row + 1
        if state.rewinds >= config.max_rewinds:
            raise NumericError(
                f"step {state.step}: loss spikes again after {state.rewinds} rewinds (train.spikes.max_rewinds); lower "
                "the learning rate or look at the samples named in log.txt, then start again"
            )
        folder = self.store.newest_before(first_spike - config.rewind_steps)
        if folder is None:
            self._spikes.give_up()
            if ranks.is_main():
                log.warning(
                    "step %d: %d spikes in a row, but no checkpoint is old enough to go back to (train.spikes."
                    "rewind_steps: %d before step %d); spikes are skipped until the loss settles",
                    *(state.step, state.spikes_in_a_row, config.rewind_steps, first_spike),
                )
            return False
        then = self.store.load(folder, self.engine, self.hooks)
        state.applied_steps, state.loss_ema, state.recent_losses = then.applied_steps, then.loss_ema, then.recent_losses
        state.skipped_in_a_row = state.spikes_in_a_row = 0
        state.rewinds += 1
        self.telemetry.restore_average(state)
        if isinstance(self.corpus.plan, OnlinePlan):
            self.corpus.plan.return_to(then.plan, steps_done=state.step)
        if ranks.is_main():
            log.warning(
                "step %d: %d spikes in a row; weights, optimizer and hooks went back to step %d, samples %d to %d do "
                "not count (rewind %d of %d)",
                *(state.step, config.patience, then.step, then.samples, state.samples - 1),
                *(state.rewinds, config.max_rewinds),
            )  # fmt: skip
        self._save(wait=True)
        self.store.discard(then.step, state.step)
        return True


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
