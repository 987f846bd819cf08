"""Are the ranks still training the same model? Asked before every checkpoint, so that none is of a run that split, and
every `train.verify_every` steps.

Replicas of a tensor must be equal bit for bit: every rank applies the same reduced gradients. A silent error of memory
or a missing reduction on one rank breaks that, and no loss shows it for a long time.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer import ranks
from trainer.errors import NumericError
from trainer.model_weights import expert_group

_AS_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def refuse_divergence(model: nn.Module, digests: Mapping[str, Any], step: int) -> None:
    """Raise NumericError, on every rank, that names the first state or tensor of which copies differ.

    `digests`: of what else must be alike, by what it is. Two collectives; every rank calls it.
    """
    held = ranks.gather_objects(dict(digests))
    for what, expected in held[0].items():
        odd = [rank for rank, each in enumerate(held) if each[what] != expected]
        if odd:
            raise NumericError(f"step {step}: {what} on rank {odd[0]} differs from rank 0; nothing was saved")
    names = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # What ZeRO 3 has cut has no copies to compare.
    kept = [n for n in model.state_dict(keep_vars=True) if n in names and not hasattr(names[n], "ds_id")]
    own = torch.stack([checksum(names[name]) for name in kept])
    found = ranks.all_gather(own).tolist()
    for column, name in enumerate(kept):
        group = expert_group(model, name)
        # Of experts spread over G ranks, every G-th rank has the same share.
        shares = 1 if group is None else torch.distributed.get_world_size(group)
        for rank, row in enumerate(found):
            if row[column] != found[rank % shares][column]:
                raise NumericError(
                    f"step {step}: {name} on rank {rank} differs from its copy on rank {rank % shares}; nothing was "
                    "saved, earlier checkpoints are intact: look at that rank's memory, then start again"
                )


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's elements read as integers, modulo 2^64: an int64 scalar on its device."""
    integers = tensor.detach().contiguous().view(_AS_INTEGERS[tensor.element_size()])
    return integers.sum(dtype=torch.int64)
