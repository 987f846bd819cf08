"""Whether the biases of a checkpoint are added to the scores or multiply them.

Both are numbers in the same place, and weights do not say which they are: what says so is the rule that the hook saved
beside them. Without one they add, for only the hook of a multiplicative rule makes a router multiply. So no run may go
on from biases of one kind with those of the other.
"""

import json
from pathlib import Path

from torch import nn

from configs.schema import RunConfig
from launch._tensors import read_manifest
from moe.router import Router
from moe.rules import multiplies
from trainer.checkpoint_files import STATES
from trainer.errors import CheckpointError, ConfigError
from trainer.train_state import TrainState


def saved_bias_multiplies(folder: Path) -> bool:
    """Whether the biases in a checkpoint multiply the scores. Those of `launch.from_hf` add.

    Raises CheckpointError if the file that says so is missing or unreadable.
    """
    if STATES not in read_manifest(folder)["files"]:
        return False
    try:
        hooks = json.loads((folder / STATES).read_text())["hooks"].values()
        return any(multiplies(entry["values"].get("rule")) for entry in hooks)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{folder / STATES} is missing or unreadable; it says what the biases are: copy the folder again"
        ) from None


def bias_multiplies(config: RunConfig) -> bool:
    """Whether the biases of a run with this configuration multiply the scores."""
    return any(
        multiplies(spec["rule"]) for spec in config.hooks.values() if spec["enabled"] and spec["hook"] == "expert_bias"
    )


def refuse_other_bias(run_dir: Path, state: TrainState | None, model: nn.Module) -> None:
    """Raises ConfigError if `model`, prepared by the hooks, reads the biases of the checkpoint just loaded otherwise.

    Here, not in the hook, because either side may have no such hook.
    """
    if state is not None:
        multiplied = any(module.multiplies for module in model.modules() if isinstance(module, Router))
        refuse_mixture(run_dir / "checkpoints" / f"step-{state.step:08d}", multiplied, "or set a new run_dir")


def refuse_mixture(folder: Path, multiplied: bool, otherwise: str) -> None:
    """Raises ConfigError if a run whose biases multiply, or do not, would read those of a checkpoint otherwise."""
    saved = saved_bias_multiplies(folder)
    if saved and not multiplied:
        raise ConfigError(
            f"hooks.expert_bias: the biases in {folder} multiply the scores and would now be added; keep rule "
            f"multiplicative (with rate 0 nothing moves), {otherwise}"
        )
    if multiplied and not saved:
        raise ConfigError(
            f"hooks.expert_bias: the biases in {folder} are added to the scores, rule multiplicative would multiply by "
            f"them; choose another rule, {otherwise}"
        )
