"""Run folders and grids as files, made in no time, for what a report or a dashboard makes of them; and their pages."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

Rows = list[dict[str, Any]]


def training_rows(steps: int, *, domains: Sequence[str] = ("code", "prose"), seed: int = 0) -> Rows:
    """Rows of training steps without any hook: a loss that falls, and what every run records."""
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(1, steps + 1):
        loss = 2 + 4 * np.exp(-step / max(steps / 4, 1)) + 0.05 * rng.normal()
        row = {
            "step": step, "tokens": 512.0 * step, "samples": 8 * step, "loss": loss, "lr": 1e-3,
            "grad_norm": 1 + rng.random(), "step/applied": 1, "time/step_s": 0.1, "time/data_s": 0.01,
            "tokens_per_s": 5120.0, "mfu": None, "memory/gib": 1.5,
        }  # fmt: skip
        for name in domains:
            row |= {f"domain/{name}/loss": loss, f"domain/{name}/weight": 0.5, f"domain/{name}/tokens": 256.0}
        rows.append(row)
    return rows


def evaluation(step: int, loss: float, *, maxvio: float | None = None, experts: int = 4) -> dict[str, Any]:
    """A row of an evaluation, of a model with one MoE layer if `maxvio` is given."""
    row: dict[str, Any] = {"step": step, "eval/loss": loss, "eval/ppl": float(np.exp(loss)), "eval/code/ppl": 9.0}
    if maxvio is not None:
        row |= {
            "eval/maxvio_global": maxvio, "moe/loads": [[1.0 + maxvio] + [1 - maxvio / (experts - 1)] * (experts - 1)],
            "moe/layer0/bias": [0.01 * step * e for e in range(experts)],
            "moe/layer0/domain_loads": [[4] * experts, [1] + [5] * (experts - 1)],
        }  # fmt: skip
    return row


def write_run(
    folder: Path, rows: Rows, *, steps: int | None = None, log: str = "", end: str = "\n", **config: Any
) -> Path:
    """A run folder with these rows; `steps`: what the configuration plans; `end`: after the last line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + end)
    if steps is not None:
        tree = {"name": folder.name, "run_dir": str(folder), "train": {"steps": steps}, **config}
        (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    if log:
        (folder / "log.txt").write_text(log)
    return folder


def write_grid(
    folder: Path, losses: Mapping[str, Sequence[float]], *, steps: int = 20, baseline: str | None = None
) -> Path:
    """A grid whose variants ended with these held-out losses, by seed; the first variant is the baseline."""
    runs, state = [], {}
    for number, (variant, by_seed) in enumerate(losses.items()):
        for seed, loss in enumerate(by_seed, start=1):
            name = f"{variant}-{seed}"
            ends = evaluation(0, 8.0, maxvio=0.5), evaluation(steps, loss, maxvio=0.1 + 0.1 * number)
            rows = [ends[0], *training_rows(steps, seed=seed), ends[1]]
            write_run(folder / name, rows, steps=steps, hooks={"expert_bias": {"rule": variant}})
            runs.append(
                {"folder": name, "variant": variant, "seed": seed, "settings": {"hooks.expert_bias.rule": variant}}
            )
            state[name] = {"status": "done", "attempts": 1, "exit_code": 0, "reason": "", "seconds": 2.0}
    described = {
        "format": 1, "name": folder.name, "config": "configs/debug.yaml", "baseline": baseline or next(iter(losses)),
        "axes": {"hooks.expert_bias.rule": list(losses)}, "runs": runs,
    }  # fmt: skip
    (folder / "grid.json").write_text(json.dumps(described))
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def links_out(page: str) -> list[str]:
    """Whatever a page would fetch from elsewhere; scripts are looked at by the browser's test."""
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|(@import|url\()""", outside)
    return [link or other for link, other in links if not link.startswith("#") and link != "data:,"]
