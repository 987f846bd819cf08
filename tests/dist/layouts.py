"""The matrix of layouts: what the config says of each, how far it is from one process, and the page that says so.

Every layout runs on four ranks, in fp32 and bf16, with activations kept and recomputed, ten steps of eight samples in two
micro-batches with both hooks on. The reference is plain torch in one process in fp32 (tests/dist/reference.py).
"""

from itertools import product
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from configs.loader import load_run_config
from tests.dist.reference import Reference
from tests.harness import ROOT, rows
from trainer.engine_config import EngineConfig
from trainer.errors import ConfigError

PAGE = ROOT / "trainer" / "LAYOUTS.md"
BEGIN, END = "<!-- written by `make layouts`, from here -->", "<!-- to here -->"
NOT_MEASURED = "not measured: run `make layouts`"
RANKS, SAMPLES = 4, 8


class Layout(NamedTuple):
    """How a run is spread over ranks."""

    zero: int
    experts: int
    sequence: int
    offload: bool

    @property
    def name(self) -> str:
        parts = [f"ZeRO {self.zero}", f"EP {self.experts}", f"SP {self.sequence}"]
        return ", ".join(parts + ["offload"] * self.offload)

    @property
    def has_engine(self) -> bool:
        """Whether the engine has this layout: the model of these tests fits any."""
        config = EngineConfig(
            zero_stage=self.zero, expert_parallel_size=self.experts, sequence_parallel_size=self.sequence,
            offload_optimizer=self.offload,
        )  # fmt: skip
        return not config.problems()

    def overrides(self, *, precision: str = "fp32", recompute: bool = False, ranks: int = RANKS) -> list[str]:
        """The settings of a run in this layout, in two micro-batches."""
        zero = ", zero_options: {stage3_param_persistence_threshold: 0}" if self.zero == 3 else ""  # cut small ones too
        return [
            f"engine={{zero_stage: {self.zero}, expert_parallel_size: {self.experts}, precision: {precision}, "
            f"sequence_parallel_size: {self.sequence}, offload_optimizer: {str(self.offload).lower()}{zero}}}",
            f"train.micro_batch_size={SAMPLES * self.sequence // (2 * ranks)}",
            f"model.activation_recompute={'block' if recompute else 'none'}",
        ]

    def refusal(self, config: Path) -> str:
        """What the configuration says against this layout; empty if it is supported."""
        try:
            load_run_config(config, self.overrides(), world_size=RANKS)
        except ConfigError as error:
            return "; ".join(line.removeprefix(f"{config}: ") for line in error.problems)
        return ""


LAYOUTS = [Layout(*values) for values in product((0, 1, 2, 3), (1, 2, 4), (1, 2, 4), (False, True))]
VARIANTS = list(product(("fp32", "bf16"), (False, True)))


class Difference(NamedTuple):
    """Largest relative differences from the reference: of a step's loss, of the weights, of a step's gradient norm.

    Of weights it is the norm of the difference over the norm: in fp32 of the tensor that differs most, in bf16 of all
    together. There, scores that lie close together send a few tokens to other experts than in fp32, and those experts
    move by whole steps of Adam.
    """

    loss: float
    weights: float
    norm: float

    def within(self, limit: "Difference") -> bool:
        return all(own <= most for own, most in zip(self, limit, strict=True))

    def most(self, other: "Difference") -> "Difference":
        return Difference(*map(max, self, other))


LIMITS = {"fp32": Difference(1e-5, 1e-4, 1e-4), "bf16": Difference(5e-4, 0.04, 0.1)}


def difference(run_dir: Path, reference: Reference, precision: str) -> Difference:
    """How far a finished run is from the reference."""
    training = [row for row in rows(run_dir) if "loss" in row]
    assert len(training) == len(reference.losses)
    assert all(row["step/applied"] == 1 for row in training)
    weights, expected = weights_of(run_dir), reference.model.state_dict()
    assert weights.keys() == expected.keys()
    keys = [key for key in expected if not key.endswith("expert_bias_E")]
    wrong = torch.stack([(weights[key].float() - expected[key]).norm() for key in keys])
    size = torch.stack([expected[key].norm() for key in keys])
    return Difference(
        _relative([float(row["loss"]) for row in training], reference.losses),
        float((wrong / size).max() if precision == "fp32" else wrong.norm() / size.norm()),
        _relative([float(row["grad_norm"]) for row in training], reference.norms),
    )


def wrong_biases(run_dir: Path, reference: Reference) -> int:
    """Experts whose bias is not the reference's.

    Steps are exact, but where scores tie to the last bits another order of summation may send a token elsewhere and, if a
    load is just at the mean, turn the sign of a step.
    """
    weights, expected = weights_of(run_dir), reference.model.state_dict()
    keys = [key for key in expected if key.endswith("expert_bias_E")]
    return sum(int(((weights[key] - expected[key]).abs() > 1e-6).sum()) for key in keys)


def weights_of(run_dir: Path) -> dict[str, Tensor]:
    """The weights of a finished run."""
    newest = max((run_dir / "checkpoints").glob("step-*"))
    return safetensors.torch.load_file(newest / "model.safetensors")


def _relative(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


HEADER = """| layout | fp32: loss | weights | gradient norm | bf16: loss | weights | gradient norm |
|---|---|---|---|---|---|---|"""


def write_page(measured: Layout, found: dict[str, Difference], config: Path) -> None:
    """Put a layout's largest differences, by precision, into the page's table; the other rows stay as they are."""
    lines, known = [HEADER], read_page()
    for layout in LAYOUTS:
        refusal = layout.refusal(config)
        cells = known.get(layout.name, [NOT_MEASURED, *[""] * 5])
        if refusal:
            cells = [f"refused: {refusal}", *[""] * 5]
        elif layout == measured:
            cells = [f"{value:.0e}" for precision in ("fp32", "bf16") for value in found[precision]]
        lines.append("| " + " | ".join([layout.name, *cells]) + " |")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    table, after = "\n".join(lines), rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")


def read_page() -> dict[str, list[str]]:
    """Cells of the table's rows by the name of the layout."""
    text = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ZeRO")]
    assert len({row[0] for row in cells}) == len(cells), "a layout has two rows"
    return {name: rest for name, *rest in cells}
