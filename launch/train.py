"""Pretrain a model: `torchrun --nproc_per_node=2 -m launch.train configs/quickstart.yaml [key=value ...]`.

Starting again with the same run folder resumes from its newest intact checkpoint. On several nodes start the same
command on each with torchrun's rendezvous options; the run folder must be on storage that all nodes share.
With init_from a new run begins with given weights (python -m launch.from_hf).
Without torchrun it trains in one process. Exit codes: 0 done, 2 config, 3 checkpoint or data, 4 numeric, 5 peer
lost, 6 storage, 75 preempted and saved (`python -m launch.torchrun` passes them on; plain torchrun ends with 1).
"""

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs.hooks import build_hooks
from configs.loader import load_run_config
from configs.schema import RunConfig
from launch._bias_kind import refuse_other_bias
from launch._cli import run_command
from launch._corpus import open_corpus
from launch._identity import identity
from launch._initial_weights import check_initial_weights, is_fresh, load_initial_weights
from launch._out_of_memory import explained_out_of_memory
from launch._run_folder import RunFolder, RunReport, print_summary, take_config
from launch.health import examine_and_record
from moe.arithmetic import flops_per_token
from moe.model import MoEDecoder
from trainer import ranks
from trainer.checkpoint import CheckpointStore
from trainer.data.corpus import TokenCorpus
from trainer.data.loader import TrainLoader
from trainer.engine import Engine
from trainer.errors import PREEMPTED_EXIT_CODE, EvenkeelError
from trainer.hooks import HookList, RunContext, StopReason
from trainer.loop import StopSignal, Trainer
from trainer.optim import build_adamw
from trainer.process_group import leave, start_process_group, stop_process_group
from trainer.profiling import StepProfiler
from trainer.schedule import learning_rate
from trainer.telemetry import StepTelemetry
from trainer.train_state import TrainState

log = logging.getLogger("evenkeel")


def main(argv: list[str]) -> int:
    """Train; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file, for instance configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance optimizer.learning_rate=3e-4")
    arguments = parser.parse_intermixed_args(argv)

    config = load_run_config(arguments.config, arguments.overrides, world_size=ranks.world_size())
    corpus = open_corpus(config)
    run_dir = Path(config.folder)
    if config.init_from and is_fresh(run_dir):
        check_initial_weights(config, corpus)
    if not build_hooks(config.hooks).sets_sampling and not (run_dir / "checkpoints").exists():
        _require_samples(config, corpus)  # again below, where a checkpoint may know better
    # From here on: ranks are ready at different moments, and one that is still loading must not die of what the others
    # only take note of; nor one that already writes its report; nor one that has lost a peer, before it has said so. So
    # after an error the handler stays.
    stop = StopSignal()
    restore_signal = stop.install()
    start_process_group(config.engine.collective_timeout_s)
    with RunFolder(run_dir):
        examine_and_record(config, corpus.vocab_size)
        reason = train(config, corpus, run_dir, stop)
    stop_process_group()
    if ranks.is_main():
        _report(run_dir)
    restore_signal()
    return PREEMPTED_EXIT_CODE if reason == "preempted" else 0


def train(config: RunConfig, corpus: TokenCorpus, run_dir: Path, stop: StopSignal) -> StopReason:
    """Build every part of the run, restore its newest checkpoint if there is one, and train until the end or `stop`."""
    with explained_out_of_memory(config, run_dir):
        return _train(config, corpus, run_dir, stop)


def _train(config: RunConfig, corpus: TokenCorpus, run_dir: Path, stop: StopSignal) -> StopReason:
    engine, hooks, run = build(config, corpus, run_dir)
    torch.manual_seed(config.seed + 1 + ranks.rank())  # from here on: dropout, different on every rank

    store = CheckpointStore(
        run_dir, config.checkpoint, identity(config, corpus.fingerprint), timeout_s=config.engine.collective_timeout_s
    )
    restored = store.load_newest(engine, hooks)
    refuse_other_bias(run_dir, restored, run.model)
    state = restored or TrainState()
    if state.plan:
        corpus.plan.restore(state.plan, state.samples)
    _require_samples(config, corpus)
    take_config(run_dir, config)  # nothing refuses this start any more
    with RunReport(config, run_dir, corpus.domain_names, start_step=state.step) as report:
        trainer = assemble(config, corpus, run_dir, engine, hooks, run, store, state, report.write, stop)
        reason = trainer.train()
    store.close()
    if ranks.is_main():
        print_summary(run_dir, corpus.domain_names, reason)
    return reason


def assemble(
    config: RunConfig,
    corpus: TokenCorpus,
    run_dir: Path,
    engine: Engine,
    hooks: HookList,
    run: RunContext,
    store: CheckpointStore,
    state: TrainState,
    write: Callable[[Sequence[Mapping[str, Any]]], None],
    stop: StopSignal,
) -> Trainer:
    """The loop over parts that are ready; `write` takes its rows of metrics."""
    telemetry = StepTelemetry(
        state,
        corpus.domain_names,
        flops_per_token=flops_per_token(config.model, corpus.vocab_size, config.train.sequence_length),
        precision=config.engine.precision,
        device=run.device,
    )
    return Trainer(
        config=config.train,
        engine=engine,
        hooks=hooks,
        run=run,
        corpus=corpus,
        loader=open_loader(config, corpus),
        learning_rate=partial(
            learning_rate, config.schedule, peak=config.optimizer.learning_rate, total_steps=config.train.steps
        ),
        evaluation=config.evaluation,
        checkpoint=config.checkpoint,
        store=store,
        telemetry=telemetry,
        profiler=StepProfiler(config.profile, engine, telemetry.clock, run_dir, start_step=state.step),
        write=write,
        state=state,
        stop=stop,
    )


def _require_samples(config: RunConfig, corpus: TokenCorpus) -> None:
    corpus.plan.require(config.train.steps * config.train.global_batch_size)


def build(config: RunConfig, corpus: TokenCorpus, run_dir: Path) -> tuple[Engine, HookList, RunContext]:
    """Model and optimizer under the engine, and the hooks, started on them."""
    device = ranks.device()
    torch.manual_seed(config.seed)  # the same initial weights on every rank
    shares = config.engine.expert_parallel_size
    model = MoEDecoder(
        config.model,
        vocab_size=corpus.vocab_size,
        expert_parallel_size=shares,
        expert_parallel_rank=ranks.rank() % shares,
    )
    if config.init_from and is_fresh(run_dir):
        load_initial_weights(model, config, share=ranks.rank() % shares, num_shares=shares)
    engine = Engine(
        model,
        build_adamw(model, config.optimizer, device),
        config.engine,
        micro_batch_size=config.train.micro_batch_size,
        clip_norm=config.optimizer.clip_norm,
    )
    hooks = build_hooks(config.hooks)
    if hooks.sets_sampling:
        corpus.sample_online(global_batch_size=config.train.global_batch_size, delay=config.data.sampling_delay)
    run = RunContext(
        model=engine.module,
        total_steps=config.train.steps,
        global_batch_size=config.train.global_batch_size,
        domain_names=corpus.domain_names,
        domain_shares=corpus.domain_shares,
        run_dir=run_dir,
        device=device,
        seed=config.seed,
        samples_per_row=corpus.documents_per_row if hooks.weighs_documents else 1,
        has_weights=hooks.has_weights,
        is_frozen=config.train.accumulation == "frozen",
        excerpts=corpus.excerpts,
    )
    hooks.on_start(run)
    return engine, hooks, run


def _report(run_dir: Path) -> None:
    from launch.report import write_report  # plotly, which no step needs

    try:
        write_report(run_dir)
    except EvenkeelError as error:
        log.warning("no report: %s", error)  # a view of the run; the run itself is safe


def open_loader(config: RunConfig, corpus: TokenCorpus) -> TrainLoader:
    """This rank's samples."""
    return TrainLoader(
        corpus,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=config.engine.data_parallel(ranks.rank()),
        world_size=config.engine.data_parallel(ranks.world_size()),
        num_workers=config.data.num_workers,
        prefetch_steps=config.data.prefetch_steps,
        pin_memory=ranks.device().type == "cuda",
    )


if __name__ == "__main__":
    leave(run_command(main))
