"""How uneven the experts' loads are. Pure functions of one layer's loads; nothing waits for the device.

Shape letters: E experts.
"""

import math

import torch
from torch import Tensor


def max_violation(counts_E: Tensor) -> Tensor:
    """MaxVio = (max_i c_i - mean) / mean (Wang et al. 2024, arXiv 2408.15664, equation 4). 0 is perfect balance.

    Float64 scalar; NaN if no token was routed.
    """
    counts_E = counts_E.double()
    mean = counts_E.mean()
    return (counts_E.max() - mean) / mean


def load_entropy(counts_E: Tensor) -> Tensor:
    """Entropy of the load distribution over log E: 1 is perfect balance, 0 one expert doing everything. Scalar."""
    counts_E = counts_E.double()
    if counts_E.numel() == 1:
        return torch.ones((), dtype=torch.float64, device=counts_E.device)
    share_E = counts_E / counts_E.sum()
    return -torch.special.xlogy(share_E, share_E).sum() / math.log(counts_E.numel())


def dead_experts(counts_E: Tensor) -> Tensor:
    """Number of experts that got no token, int64 scalar."""
    return (counts_E == 0).sum()
