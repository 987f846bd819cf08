"""What the weights promise where theory has something to say: a convex toy, its bound, and the cap condition.

Each f_i convex and L-smooth, one minimiser theta* for all, gradient steps of size eta <= 1/(2L) on sum_i w_i f_i:

    (1/T) sum_t sum_i w_i f_i(theta_t)  <=  D0^2 / (eta T),      D0 = ||theta_0 - theta*||,

so that the uniform average is at most that plus the correction (1/T) sum_t sum_i (1/B - w_i) f_i(theta_t), which is not
positive whenever weights do not fall with the loss (Chebyshev's sum inequality). The setting is that of Sow et al. 2025
(arXiv 2502.06733); the constants were derived and checked here.

Shape letters: B functions, P parameters, T steps.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Weigh = Callable[[Tensor], Tensor]
"""losses_B -> weights_B, summing to one"""


class Quadratics(NamedTuple):
    """f_i(theta) = 1/2 (a_i theta)^2: convex, smooth, all minimal at theta = 0."""

    directions_BP: Tensor
    start_P: Tensor

    @property
    def step_size(self) -> float:
        """eta = 1 / (2 L), with L the largest smoothness constant max_i ||a_i||^2."""
        return 1 / (2 * float(self.directions_BP.square().sum(dim=1).max()))

    def losses(self, theta_P: Tensor) -> Tensor:
        return 0.5 * (self.directions_BP @ theta_P).square()


def toy_quadratics(seed: int = 0, num_functions: int = 64, width: int = 80) -> Quadratics:
    """The toy: standard normal directions and start, float64."""
    generator = torch.Generator().manual_seed(seed)
    directions_BP = torch.randn(num_functions, width, dtype=torch.float64, generator=generator)
    return Quadratics(directions_BP, torch.randn(width, dtype=torch.float64, generator=generator))


class Descent(NamedTuple):
    """What gradient descent on the weighted sum went through, before each of its steps."""

    average_T: Tensor
    """Uniform mean of the losses."""
    weighted_T: Tensor
    """sum_i w_i f_i."""
    bound: float
    """D0^2 / (eta T), which the mean of `weighted_T` cannot exceed."""

    @property
    def correction(self) -> float:
        """(1/T) sum_t sum_i (1/B - w_i) f_i: by how much the bound of the uniform average differs."""
        return float((self.average_T - self.weighted_T).mean())


def descend(problem: Quadratics, weigh: Weigh, steps: int) -> Descent:
    """`steps` gradient steps of size 1 / (2 L) on the weighted sum, with weights from the losses of each step."""
    theta_P, rate = problem.start_P.clone(), problem.step_size
    average, weighted = [], []
    for _ in range(steps):
        residual_B = problem.directions_BP @ theta_P
        losses_B = 0.5 * residual_B.square()
        weights_B = weigh(losses_B)
        average.append(losses_B.mean())
        weighted.append((weights_B * losses_B).sum())
        theta_P = theta_P - rate * (weights_B * residual_B) @ problem.directions_BP
    bound = float(problem.start_P.square().sum()) / (rate * steps)
    return Descent(torch.stack(average), torch.stack(weighted), bound)


def smallest_temperature_for_cap(cap: float = 2.0) -> float:
    """The r from which no weight can exceed cap / B, whatever the batch, for scores that span 1: 1 / ln(cap).

    Scores in [0, 1] give weights whose ratio is at most e^(1/r); the largest, one of B, is then below e^(1/r) / B.
    """
    return 1 / math.log(cap)
