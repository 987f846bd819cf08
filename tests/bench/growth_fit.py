"""Exponents of measured curves beside those of theory, and the file that keeps both.

tests.bench.growth writes it, tests.bench.figures draws it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MARGIN = 0.15
"""An exponent this much above that of theory is a defect. 10 % of noise at one end of four doublings move the
exponent by 0.03, and that of the last three points by 0.07."""
TAIL = 3


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the least-squares line through the logarithms. Raises ValueError for fewer than two sizes, and for
    sizes and values that are not positive."""
    if len(set(sizes)) < 2 or len(sizes) != len(values):
        raise ValueError(f"an exponent needs two sizes and a value for each: {list(sizes)}, {list(values)}")
    if min(*sizes, *values) <= 0:
        raise ValueError(f"sizes and values must be positive: {list(sizes)}, {list(values)}")
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


@dataclass(frozen=True)
class Curve:
    """CPU seconds along one axis, and what theory says they should be in proportion to."""

    size: Sequence[int]
    seconds: Sequence[float]
    theory: Sequence[float]

    @property
    def exponents(self) -> tuple[float, float]:
        """Measured and by theory, over all points."""
        return exponent(self.size, self.seconds), exponent(self.size, self.theory)

    @property
    def last_exponents(self) -> tuple[float, float]:
        """The same over the last three points: a fixed cost at the beginning hides nothing there."""
        return exponent(self.size[-TAIL:], self.seconds[-TAIL:]), exponent(self.size[-TAIL:], self.theory[-TAIL:])

    @property
    def is_steep(self) -> bool:
        """Whether it rises faster than theory, by more than `MARGIN`, as a whole or at its end."""
        return any(measured > expected + MARGIN for measured, expected in (self.exponents, self.last_exponents))


def write_curves(path: Path, facts: Mapping[str, Any], curves: Mapping[str, Curve]) -> None:
    """Figures with their exponents; `facts` say what they were measured on."""
    rows = {}
    for name, curve in curves.items():
        (measured, expected), (last, last_expected) = curve.exponents, curve.last_exponents
        rows[name] = {
            "size": list(curve.size), "seconds": _digits(curve.seconds), "theory": _digits(curve.theory),
            "exponent": round(measured, 3), "theory_exponent": round(expected, 3), "last_exponent": round(last, 3),
            "last_theory_exponent": round(last_expected, 3), "above_theory": curve.is_steep,
        }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "margin": MARGIN, "curves": rows}, indent=1) + "\n")


def read_curves(path: Path) -> tuple[dict[str, Any], dict[str, Curve]]:
    """Facts and curves of such a file."""
    facts = json.loads(path.read_text())
    rows = facts.pop("curves")
    return facts, {name: Curve(row["size"], row["seconds"], row["theory"]) for name, row in rows.items()}


def _digits(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
