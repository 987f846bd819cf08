"""What a reader of an exported model must know: what it is, where it comes from, how it was measured."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from configs.loader import to_dict
from configs.schema import RunConfig
from launch._tensors import WEIGHTS
from moe.arithmetic import count_parameters
from trainer.metrics import newest_first

_SHOWN = ("seed", "model", "train", "optimizer", "schedule", "hooks")  # what was trained, not where it lay
_TEXT = """---
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, evenkeel]
---

# {name}

A mixture-of-experts language model pretrained with Evenkeel {version}: {total:,} parameters, {active:,} a token.
It is a base model: it continues text, it was not tuned to follow instructions or to be safe.

| | |
|---|---|
| architecture | `{architecture}`, {dtype} |
| run | `{name}`, step {step:,} of {steps:,} |
| training tokens | {tokens} |
| training text | `{source}` |
| held-out loss (nats a token) | {heldout} |
| sha256 of the checkpoint's weights | `{sha256}` |

The training text decides what the model may be used for and under which licence; state both here before sharing it.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

## Configuration of the run

```yaml
{config}```
"""


def model_card(
    run: Path, config: RunConfig, manifest: Mapping[str, Any], *, vocab_size: int, architecture: str, dtype: str
) -> str:
    """README.md of an export; figures come from the run's own metrics, and are left open where it has none."""
    step = int(manifest["step"])
    metrics = run / "metrics.jsonl"
    tokens, measured = _last_figures(metrics, step) if metrics.is_file() else (None, None)
    count = count_parameters(config.model, vocab_size)
    shown = {name: section for name, section in to_dict(config).items() if name in _SHOWN}
    return _TEXT.format(
        name=config.name,
        version=version("evenkeel"),
        total=count.num_total,
        active=count.num_active,
        architecture=architecture,
        dtype=dtype,
        step=step,
        steps=config.train.steps,
        tokens="not recorded" if tokens is None else f"{int(tokens):,}",
        source=config.data.source,
        heldout="not measured" if measured is None else f"{measured[1]:.4f} (measured at step {measured[0]:,})",
        sha256=manifest["files"][WEIGHTS]["sha256"],
        config=yaml.safe_dump(shown, sort_keys=False, allow_unicode=True),
    )


def _last_figures(metrics: Path, step: int) -> tuple[float | None, tuple[int, float] | None]:
    """Tokens trained on, and the last held-out loss with its step, up to `step`; None where a run has none."""
    tokens: float | None = None
    measured: tuple[int, float] | None = None
    for row in newest_first(metrics):
        if row.get("step", 0) > step:
            continue
        if tokens is None:
            tokens = row.get("tokens")
        if measured is None and row.get("eval/loss") is not None:
            measured = row["step"], row["eval/loss"]
        if tokens is not None and measured is not None:
            break
    return tokens, measured
