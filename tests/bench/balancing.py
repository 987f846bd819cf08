"""The table of moe/README.md: `python -m tests.bench.balancing [--steps 400] [--seeds 3]`.

Trains the quickstart with each way of balancing and several seeds, two one-rank runs at a time, and prints held-out
loss and MaxVio_global as a Markdown table. Runs that are already there are not repeated.
"""

import argparse
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.harness import rows, run

METHODS = {
    "none": ["hooks.expert_bias.rule=none"],
    "aux loss (switch, 0.01)": ["hooks.expert_bias.rule=none", "model.aux_loss.switch=0.01"],
    "aux loss (global batch, 0.01)": ["hooks.expert_bias.rule=none", "model.aux_loss.global_batch=0.01"],
    "sign": ["hooks.expert_bias.rule=sign", "hooks.expert_bias.rate=0.01"],
    "proportional": ["hooks.expert_bias.rule=proportional", "hooks.expert_bias.rate=0.01"],
    "quantile": ["hooks.expert_bias.rule=quantile"],
    "sign, rate falling as a cosine": [
        "hooks.expert_bias.rule=sign", "hooks.expert_bias.rate=0.02", "hooks.expert_bias.schedule.shape=cosine",
    ],
    "proportional, twice the rate": ["hooks.expert_bias.rule=proportional", "hooks.expert_bias.rate=0.02"],
    "quantile, averaged (ema 0.9)": ["hooks.expert_bias.rule=quantile", "hooks.expert_bias.options.ema=0.9"],
}  # fmt: skip


def train(name: str, overrides: list[str], seed: int, steps: int) -> tuple[float, float]:
    """Held-out loss and MaxVio_global at the end of one run."""
    slug = "".join(c if c.isalnum() else "-" for c in name)
    run_dir = Path(f"runs/balancing/{slug}-{seed}-{steps}")
    if not (run_dir / "checkpoints" / f"step-{steps:08d}").exists():
        done = run(
            "launch.train", "configs/quickstart.yaml", *overrides, f"seed={seed}", f"train.steps={steps}",
            f"run_dir={run_dir}", "evaluation.every=0", "evaluation.max_rows=64", "checkpoint.every=0",
            "wandb.mode=disabled", timeout=3600,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
    last = [row for row in rows(run_dir) if "eval/loss" in row][-1]
    return float(last["eval/loss"]), float(last["eval/maxvio_global"])  # type: ignore[arg-type]


def spread(values: list[float], digits: int) -> str:
    """Mean and sample standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    jobs = [(m, o, seed) for seed in range(1, arguments.seeds + 1) for m, o in METHODS.items()]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda job: train(*job, arguments.steps), jobs))
    sys.stdout.write("| balancing | held-out loss | MaxVio_global |\n|---|---|---|\n")
    for method in METHODS:
        found = [result for job, result in zip(jobs, results, strict=True) if job[0] == method]
        losses, violations = zip(*found, strict=True)
        sys.stdout.write(f"| {method} | {spread(list(losses), 3)} | {spread(list(violations), 3)} |\n")
