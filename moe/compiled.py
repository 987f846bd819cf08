"""Regional torch.compile: what lies between matrix products is fused with them, if `model.compile` asks for it.

Two kinds of region, each compiled as a whole or not at all (`fullgraph`): attention with the norms and the residual
sum around it, and SwiGLU feed-forwards. All blocks share the compiled code. Router and experts stay as they are: they
choose by numbers that close to a tie decide otherwise, talk to other ranks, and are one loop or one grouped product
already.

Shapes are symbols from the start, so that another micro-batch or a shorter row compiles nothing new. There is one
version for training, one for forwards without a graph, one for evaluation. Results differ from those without it by
rounding, and dropout draws other masks.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn

from moe.blocks import Block
from moe.layers import FeedForward
from trainer.errors import ConfigError

_VERSIONS = 64  # of one function: its modes, times the widths of feed-forwards; torch would allow eight and then refuse


def compile_regions(model: nn.Module) -> None:
    """From now on run the regions of every block compiled; each is compiled when it is first met."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VERSIONS)
    for module in model.modules():
        if isinstance(module, Block):
            module.mix = _compiled(module.mix)  # type: ignore[method-assign]
        elif isinstance(module, FeedForward):
            module.forward = _compiled(module.forward)  # type: ignore[method-assign]


def _compiled(region: Callable[..., Any]) -> Callable[..., Any]:
    """The region compiled; ConfigError where that cannot be done, for want of a C++ compiler for instance."""
    compiled = torch.compile(region, dynamic=True, fullgraph=True)

    @wraps(region)
    def run(*inputs: Any) -> Any:
        try:
            return compiled(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ConfigError(
                f"model.compile: torch.compile cannot do it here ({reason.strip()}); set it to false"
            ) from error

    return run
