"""A metrics file as long as that of a run of weeks, and what reading it costs."""

import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas  # noqa: F401  # W&B loads it with its first picture, and code is not what is measured
import plotly.graph_objects

STEPS, EVERY = 20_000, 500
BEST_STEP = 7_500
ALLOWED_BYTES = 24 << 20


def rows() -> Iterator[dict[str, Any]]:
    """Rows as wide as the quickstart's, an evaluation every 500 steps; the best one is not the last."""
    filler = {f"domain/{name}/{what}": 1 / 3 for name in "abcdefgh" for what in ("loss", "weight", "tokens", "share")}
    for step in range(1, STEPS + 1):
        yield {"step": step, "tokens": 512 * step, "loss": 2.5, "grad_norm": 1 / 7, "time/step_s": 0.1} | filler
        if step % EVERY == 0:
            yield evaluation(step)


def evaluation(step: int) -> dict[str, Any]:
    """The row of the evaluation at a step."""
    vectors = {f"moe/layer{layer}/bias": [step + expert / 7 for expert in range(16)] for layer in range(3)}
    loss = 2 + abs(step - BEST_STEP) / STEPS
    return {"step": step, "eval/loss": loss, "eval/maxvio_global": 0.5, "moe/loads": [[1.0] * 16] * 3} | vectors


def write(path: Path) -> int:
    """Write the file; returns its size, which is many times what readers may take."""
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows())
    return path.stat().st_size


@contextmanager
def in_little_memory(allowed: int = ALLOWED_BYTES) -> Iterator[None]:
    """Fails if Python's objects take more than that at any moment in between."""
    plotly.graph_objects.Figure().add_scatter(x=[0], y=[0]).to_json()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield
        taken = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert taken < allowed, f"{taken / 2**20:.0f} MiB"
