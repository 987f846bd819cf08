"""What each way of accumulating costs: `python -m tests.bench.reweighting`.

For each mode: the relative error of the first step's gradient against plain autograd on the full batch (two ranks,
`linear` weights for `frozen`, which are exact then; `linupper` for the others), CPU time of a step and peak memory,
both as ratios to unweighted training of the same model (one rank, four micro-batches, one thread). Times are medians of
interleaved rounds in one process; memory is the peak of a process of its own that trains three steps. Prints the table
and writes runs/bench-reweighting.json.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from configs.loader import load_run_config
from launch._corpus import open_corpus
from launch.train import build, open_loader
from tests.bench.group import join_process_group
from tests.bench.timing import Timing, interleaved
from tests.harness import environment, run, tiny_config, write_corpus_source
from trainer import ranks
from trainer.accumulate import Accumulator
from trainer.data.config import DataConfig
from trainer.data.prepare import prepare
from trainer.hooks import StepResult
from trainer.metrics import MetricBuffer
from trainer.process_group import start_process_group, stop_process_group

REWEIGHT = "hooks.sample_reweight"
MODES = {
    "unweighted": [f"{REWEIGHT}.enabled=false"],
    "deferred": ["train.accumulation=deferred"],
    "frozen": ["train.accumulation=frozen", f"{REWEIGHT}.frozen.tolerance=1e9"],
    "two_pass": ["train.accumulation=two_pass"],
    "auto": ["train.accumulation=auto"],
}
TARGETS = {"deferred": 1.02, "frozen": 1.01, "two_pass": 1.35}
ROUNDS = 15
SHAPE = {
    "hidden_size": 128, "num_layers": 4, "num_dense_layers": 1, "dense_intermediate_size": 384, "num_heads": 4,
    "num_kv_heads": 2, "num_experts": 16, "top_k": 2, "expert_intermediate_size": 96, "num_shared_experts": 1,
}  # fmt: skip


def stepper(config_path: Path, mode: str, overrides: Sequence[str] = ()) -> Callable[[], None]:
    """A function that trains one step in this process."""
    config = load_run_config(config_path, [*MODES[mode], *overrides])
    corpus = open_corpus(config)
    engine, hooks, context = build(config, corpus, Path(config.folder))
    accumulator = Accumulator(
        engine, hooks, mode=config.train.mode(needs_whole_step=hooks.needs_batch_losses),
        normalization=config.train.loss_normalization,
        num_micro_batches=config.train.global_batch_size // config.train.micro_batch_size // ranks.world_size(),
        samples_per_row=1, device=context.device,
    )  # fmt: skip
    batches = open_loader(config, corpus).batches(0)
    count = 0

    def step() -> None:
        nonlocal count
        recorder = MetricBuffer()
        done = accumulator.run(next(batches), step=count + 1, applied_steps=count, recorder=recorder)
        applied, _ = engine.step(1e-3, done.gradient_scale)
        assert applied
        hooks.after_step(done.context, StepResult(applied=True, reason=""))
        accumulator.budget.settle()
        count += 1

    return step


def step_times(modes: Iterable[str]) -> dict[str, Timing]:
    """CPU time of a step in each of these modes, on a corpus of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        config_path = timed_config(Path(temporary), small_corpus(Path(temporary)))
        join_process_group()
        # The first two steps of a run are special.
        return interleaved({mode: stepper(config_path, mode) for mode in modes}, rounds=ROUNDS, warm_up=2)


def small_corpus(folder: Path) -> DataConfig:
    """A prepared corpus of a few documents."""
    data = DataConfig(
        path=str(folder / "prepared"), source=str(write_corpus_source(folder / "source.jsonl")), vocab_size=320,
        heldout_fraction=0.1,
    )  # fmt: skip
    prepare(data)
    return data


def timed_config(folder: Path, data: DataConfig) -> Path:
    """The configuration whose steps are timed."""
    return tiny_config(
        folder / "timed", data, model=SHAPE,
        train={"global_batch_size": 32, "micro_batch_size": 8, "sequence_length": 128, "steps": 100},
        hooks={"sample_reweight": {"temperature": {"value": 1.0, "warmup_steps": 0}, "record_every": 0}},
    )  # fmt: skip


def peak_memory(config_path: Path, mode: str) -> int:
    """Peak bytes of a process of its own that trains three steps."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.reweighting", "--memory", mode, "--config", str(config_path)],
        env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout.split()[-1])


def gradient_errors(folder: Path, data: DataConfig) -> dict[str, float]:
    """Relative error of the first step's gradient in each mode that has weights, on two ranks."""
    base = tiny_config(
        folder, data, model={"init_std": 0.1}, hooks={"sample_reweight": {"frozen": {"tolerance": 1e9}}}
    )  # losses far enough apart that their scale does not hang on float32's rounding of token losses
    common = ["train.micro_batch_size=1", "engine.zero_stage=1", f"{REWEIGHT}.temperature.warmup_steps=0"]
    modes = [mode for mode in MODES if mode != "unweighted"]
    plan = [
        [str(base), [*common, *MODES[m], *([f"{REWEIGHT}.strategy=linear"] if m == "frozen" else [])]] for m in modes
    ]
    out = folder / "errors.json"
    done = run("tests.dist.gradients", json.dumps(plan), str(out), ranks=2)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return dict(zip(modes, json.loads(out.read_text()), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", choices=list(MODES), help=argparse.SUPPRESS)  # the child of `peak_memory`
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        start_process_group(60)
        step = stepper(arguments.config, arguments.memory)
        for _ in range(3):
            step()
        sys.stdout.write(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}\n")
        stop_process_group()
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = small_corpus(folder)
        config_path = timed_config(folder, data)
        errors = gradient_errors(folder / "errors", data)
        memory = {mode: peak_memory(config_path, mode) for mode in MODES}
    times = step_times(MODES)
    assert not ranks.is_distributed()
    figures = {
        mode: {
            "gradient_error": errors.get(mode),
            "time": times[mode].median / times["unweighted"].median,
            "memory": memory[mode] / memory["unweighted"],
            "memory_mib": memory[mode] / 2**20,
        }
        for mode in MODES
    }
    Path("runs").mkdir(exist_ok=True)
    Path("runs/bench-reweighting.json").write_text(json.dumps(figures, indent=1))
    table = Table("mode", "gradient error", "step time", "target", "peak memory", box=None)
    for mode, row in figures.items():
        target = TARGETS.get(mode)
        verdict = "" if target is None else f"<= {target}" + ("" if row["time"] <= target else "  MISSED")
        error = "" if row["gradient_error"] is None else f"{row['gradient_error']:.1e}"
        table.add_row(mode, error, f"{row['time']:.3f}", verdict, f"{row['memory']:.2f} ({row['memory_mib']:.0f} MiB)")
    Console().print(table)


if __name__ == "__main__":
    main()
