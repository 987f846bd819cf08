"""Which scores a foreign router adds its bias to: rules that solve for the bias (quantile, bip) work on them.

Found by trying, on the running router, rather than looked up by family: so it holds for families that are not known
yet, and cannot be wrong in silence.

Shape letters: E experts, N tokens, K experts a token uses.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe.foreign_routers import ForeignRouter
from trainer.errors import ConfigError

_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits_NE: logits_NE.softmax(dim=-1),
}


def logits_of(outputs: Any) -> Tensor:
    """The router's logits, float32 [N, E]: by convention the first tensor it returns."""
    logits: Tensor = outputs[0]
    return logits.detach().float().flatten(0, -2)


def find_scores(
    router: ForeignRouter, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
) -> Callable[[Tensor], Tensor]:
    """Which bounded function of the logits the bias is added to, found by trying on the running router.

    A bias of random numbers as large as the scores' spread is put in for one call: the function whose TopK of score +
    bias is then the router's selection is the right one. Raises ConfigError if none is (unbounded scores, groups ...).
    """
    logits_NE = logits_of(outputs)
    bias_E, top_k = router.bias_E, router.indices(outputs).shape[1]
    noise_E = torch.randn(len(bias_E), generator=torch.Generator().manual_seed(0)).to(bias_E)
    old_E = bias_E.clone()
    if logits_NE.shape[-1] == len(bias_E) and top_k < len(bias_E):
        for scores in _SCORES.values():
            scores_NE = scores(logits_NE)
            probe_E = noise_E * scores_NE.std(dim=-1).mean()
            try:
                bias_E.copy_(probe_E)
                chosen_NK = router.indices(router.module.forward(*args, **kwargs))
            finally:
                bias_E.copy_(old_E)
            expected_NK = (scores_NE + probe_E).topk(top_k, dim=-1).indices
            agree = (chosen_NK.sort(-1).values == expected_NK.sort(-1).values).all(-1).float().mean()
            if agree > 0.99:  # ties apart
                return scores
    raise ConfigError(
        f"balancer: quantile and bip need to know the scores, and {router.name} ({type(router.module).__name__}) does "
        "not select the TopK of sigmoid or softmax scores plus bias (groups, or unbounded scores); choose another rule"
    )
