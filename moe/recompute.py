"""Activation recomputation: what the backward makes again instead of keeping it.

`model.activation_recompute` has three policies:

- `none` keeps everything.
- `selective` keeps what is expensive (outputs of matrix products, attention, collectives, the experts' loop on a CPU)
  and makes again what only moves data: inside of norms, SwiGLU, the copies of tokens that grouped products want. Each
  of these is a region of its own that ends with at most one product, and a region is made again only as far as the
  backward needs it: up to the input of that product, so no product is run twice. Regions draw no random numbers, talk
  to nobody and count nothing.
- `block` keeps the input of each block and makes the rest again, products and collectives included (moe/model.py).

All three give the same bits. Not made again under `selective`: rotary positions, residual sums and dropout, which keep
nothing that the products around them do not keep anyway (dropout: its mask, in place of what it masks).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def remade(policy: bool, region: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`region(*inputs)`; if `policy`, of all that it keeps for the backward only the inputs are kept."""
    if not (policy and torch.is_grad_enabled()):
        return region(*inputs)
    output: Tensor = checkpoint(region, *inputs, use_reentrant=False, preserve_rng_state=False)
    return output
