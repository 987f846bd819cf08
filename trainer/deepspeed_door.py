"""The one module that imports deepspeed, and it does so late: configs and --help stay fast."""

import logging
import os
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trainer import ranks

_MARKER = "expert_groups"


def adopt_process_group() -> None:
    """Let DeepSpeed use the process group that exists; builds its CPU extension on the first call ever."""
    logging.getLogger("DeepSpeed").setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "WARNING").upper())
    import deepspeed

    deepspeed.init_distributed(dist_backend="nccl" if ranks.device().type == "cuda" else "gloo")


def read_zero_options(options: dict[str, Any], *, stage: int) -> tuple[dict[str, Any], list[str]]:
    """Keys of the `zero_optimization` table as DeepSpeed reads them, and what its schema has against them.

    The latter one line each, with nothing read then.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        table = DeepSpeedZeroConfig(stage=stage, **options)
    except ValidationError as error:
        return {}, [f"{'.'.join(map(str, ('zero_options', *item['loc'])))}: {item['msg']}" for item in error.errors()]
    return {key: getattr(table, key) for key in options if hasattr(table, key)}, []


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """The DeepSpeed engine around a model and its optimizer."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def initialize_with_experts(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], size: int
) -> tuple[Any, dist.ProcessGroup]:
    """The same where `size` consecutive ranks share the experts, and the group of those of this rank."""
    model.add_module(_MARKER, _expert_group_marker(size))
    engine = initialize(model, optimizer, config)
    del model._modules[_MARKER]  # its work is done, and its name must not get into checkpoints
    from deepspeed.utils import groups

    group: dist.ProcessGroup = groups._get_expert_parallel_group(f"ep_size_{size}")
    return engine, group


def gathered(parameter: nn.Parameter, *, write: bool) -> AbstractContextManager[None]:
    """Have all of a parameter that stage 3 has cut; `write`: keep what rank 0 writes into it. A collective."""
    import deepspeed

    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        [parameter], modifier_rank=0 if write else None
    )
    return context


def _expert_group_marker(size: int) -> nn.Module:
    """An empty module by which DeepSpeed learns that there are expert groups: it looks for subclasses of its MoE."""
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    class ExpertGroups(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.expert_group_name = f"ep_size_{size}"
            self.num_experts = self.ep_size = size
            self.num_local_experts = 1

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            if self.expert_group_name not in groups._get_expert_parallel_group_dict():
                groups._create_expert_and_data_parallel(size, use_data_before_expert_parallel_=False)

    return ExpertGroups()
