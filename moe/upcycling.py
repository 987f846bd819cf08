"""A dense feed-forward as experts that together are the same function.

"Sparse Upcycling" (Komatsuzaki et al. 2023, arXiv 2212.05055) makes every expert a copy of the dense feed-forward. With
granularity G the feed-forward is first cut into G pieces of width F / G, and every piece copied; a router whose rows
are alike for the G pieces of one copy then chooses them together ("virtual groups", He et al. 2024, arXiv 2410.07524).

The function is preserved at the start if gates are normalised, K is a multiple of G, and the output of the routed
experts is multiplied by G: the chosen experts are then K / G whole copies, whose gates are alike within a copy and sum
to 1 over all, so each of the G pieces carries 1 / G of the gate mass. Without normalisation, or with another K, it
is not.

Shape letters: D model width, F dense width, f expert width (F / G), E experts.
"""

import torch
from torch import Tensor


def upcycle_problems(*, width: int, num_experts: int, top_k: int, granularity: int) -> list[str]:
    """Why the function of a feed-forward of `width` would not be preserved, one line each."""
    if granularity < 1 or width % granularity:
        return [f"--granularity: {granularity} does not divide the dense width ({width})"]
    found = []
    if num_experts % granularity:
        found.append(f"--experts: {num_experts} is not a multiple of --granularity ({granularity})")
    if top_k % granularity:
        found.append(f"--top-k: {top_k} is not a multiple of --granularity ({granularity})")
    if top_k == 1 < num_experts:
        found.append(
            "--top-k: 1 of several experts has a normalised gate of 1 always, of which no router learns; use 2"
        )
    if not 1 <= top_k <= num_experts:
        found.append(f"--top-k: {top_k} must be between 1 and --experts ({num_experts})")
    return found


def upcycle_gate_up(weight_FD: Tensor, *, num_experts: int, granularity: int) -> Tensor:
    """Both input projections [2F, D] as those of every expert, [E, D, 2f]; expert e is piece e mod G."""
    pieces = [half.unflatten(0, (granularity, -1)) for half in weight_FD.chunk(2)]  # [G, f, D] each
    return torch.cat(pieces, dim=1).transpose(1, 2).repeat(num_experts // granularity, 1, 1)


def upcycle_down(weight_DF: Tensor, *, num_experts: int, granularity: int) -> Tensor:
    """The output projection [D, F] as that of every expert, [E, f, D]."""
    pieces_GfD = weight_DF.T.unflatten(0, (granularity, -1))
    return pieces_GfD.repeat(num_experts // granularity, 1, 1)


def upcycle_router(
    *, num_experts: int, granularity: int, hidden_size: int, std: float, generator: torch.Generator
) -> Tensor:
    """Rows of a new router [E, D], normal with deviation `std`, the same for all pieces of a copy."""
    rows = torch.empty(num_experts // granularity, hidden_size).normal_(std=std, generator=generator)
    return rows.repeat_interleave(granularity, dim=0)
