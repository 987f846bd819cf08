"""What an evaluation says about balance: loads by domain, their matrices, and the duality gap of a sample of tokens.

Loads of the whole held-out split are the sums of those of its domains, so that one pass serves both. One all-reduce
carries the loads of all layers and domains. The gap is exact for its sample; layers are dealt to ranks, each is solved
once, and the results are shared: that makes them the same everywhere.

Shape letters: L MoE layers, E experts, D domains, S tokens of the sample.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe.theory import gap_per_token
from trainer import ranks


class DomainLoads:
    """Collects each layer's loads while the domains go by."""

    def __init__(self, num_domains: int) -> None:
        self._num_domains = num_domains
        self._by_domain: dict[int, list[Tensor]] = {}

    def add(self, domain: int, counts: Sequence[Tensor]) -> None:
        """Loads of every layer, int64 [E], over this rank's rows of a domain."""
        self._by_domain[domain] = [counts_E.clone() for counts_E in counts]

    def take(self, rest: Sequence[Tensor]) -> list[Tensor]:
        """int64 [D, E] for each layer, summed over ranks, and forget them. `rest`: loads of no named domain, all zero
        in a run; they are counted with the first. A collective.
        """
        by_domain, self._by_domain = self._by_domain, {}
        zeros = [torch.zeros_like(counts_E) for counts_E in rest]
        rows = [torch.cat(by_domain.get(domain, zeros)) for domain in range(self._num_domains)]
        rows[0] = rows[0] + torch.cat(list(rest))
        whole = ranks.all_reduce_(torch.stack(rows))
        return list(whole.split([len(counts_E) for counts_E in rest], dim=1))


def layer_matrix(vectors: Sequence[Tensor]) -> Tensor:
    """Vectors of all layers as one matrix, float32 [L, E]; NaN where a layer has fewer experts than the largest."""
    width = max(len(vector_E) for vector_E in vectors)
    return torch.stack(
        [torch.nn.functional.pad(vector_E.float(), (0, width - len(vector_E)), value=torch.nan) for vector_E in vectors]
    )


def relative_loads(counts_E: Tensor) -> Tensor:
    """Loads over their mean, float64 [E]: 1 is an even share. NaN if no token was routed."""
    counts_E = counts_E.double()
    return counts_E / counts_E.mean()


def duality_gaps(samples: Sequence[Tensor | None], prices: Sequence[Tensor], top_k: Sequence[int]) -> Tensor:
    """Gap of each layer's sample for each of its tokens, float64 [L]; NaN where there is no sample. A collective.

    `samples` [S, E] and the biases `prices` [E] must be the same on every rank.
    """
    gaps_L = torch.zeros(len(samples), dtype=torch.float64)
    share = range(len(samples))[ranks.rank() :: ranks.world_size()] if ranks.is_distributed() else range(len(samples))
    for layer in share:
        sample_SE = samples[layer]
        gaps_L[layer] = (
            torch.nan
            if sample_SE is None
            else gap_per_token(sample_SE.cpu(), prices[layer].detach().cpu(), top_k[layer])
        )
    return ranks.all_reduce_(gaps_L.to(ranks.device()))
