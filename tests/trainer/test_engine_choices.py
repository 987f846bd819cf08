"""What is chosen for DeepSpeed: bounded, monotone, the same for all ranks, and never against what was configured."""

from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.deepspeed_door import read_zero_options
from trainer.engine_choices import ALONE, LEAST, LIMIT, MOST, bucket_elements, choices, zero_table
from trainer.engine_config import EngineConfig

parameters = st.integers(1, 10**13)
ranks = st.integers(2, 100_000)

SUPPORTED = [
    config
    for stage, precision, shares, offload in product((0, 1, 2, 3), ("fp32", "bf16"), (1, 2), (False, True))
    if not (
        config := EngineConfig(
            zero_stage=stage, precision=precision, expert_parallel_size=shares, offload_optimizer=offload  # type: ignore[arg-type]
        )
    ).problems()
]  # fmt: skip


@given(parameters, ranks)
def test_a_bucket_is_bounded(num_parameters: int, world_size: int) -> None:
    assert LEAST <= bucket_elements(num_parameters, world_size) <= LIMIT
    assert bucket_elements(num_parameters, 2) <= MOST
    assert bucket_elements(num_parameters, 1) == ALONE


@given(parameters, parameters, ranks, ranks)
def test_a_bucket_grows_with_model_and_ranks(few: int, more: int, near: int, far: int) -> None:
    (few, more), (near, far) = sorted((few, more)), sorted((near, far))
    assert bucket_elements(few, near) <= bucket_elements(more, near)
    assert bucket_elements(few, near) <= bucket_elements(few, far)


def test_golden_buckets() -> None:
    found = {
        (size, ranks): bucket_elements(size, ranks)
        for size, ranks in ((10_000_000, 2), (1_000_000_000, 8), (10**12, 8), (10**12, 128), (10**12, 1024))
    }
    assert list(found.values()) == [1_250_000, 40_000_000, 40_000_000, 128_000_000, 500_000_000]


@given(st.sampled_from(SUPPORTED), parameters, st.integers(1, 4096))
def test_choosing_twice_is_choosing_alike_and_says_why(config: EngineConfig, size: int, world_size: int) -> None:
    found = choices(config, size, world_size)
    assert found == choices(config, size, world_size)
    assert zero_table(config, size, world_size) == zero_table(config, size, world_size)
    assert all(choice.value and choice.why for choice in found)
    assert not any(choice.why == "as configured" for choice in found)


@pytest.mark.parametrize("config", SUPPORTED, ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 64])
def test_deepspeed_takes_what_is_chosen(config: EngineConfig, world_size: int) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    table = zero_table(config, 10_000_000, world_size)
    taken = DeepSpeedZeroConfig(**table)
    assert all(getattr(taken, key) == value for key, value in table.items() if key != "offload_optimizer")


def test_what_is_configured_is_what_is_used() -> None:
    mine: dict[str, Any] = {"overlap_comm": True, "contiguous_gradients": False, "reduce_scatter": False}
    config = EngineConfig(zero_stage=2, bucket_elements=12345, grad_accumulation="fp32", zero_options=mine)
    assert not config.problems()
    table = zero_table(config, 10_000_000, 8)
    assert table["reduce_bucket_size"] == 12345
    assert table.items() >= mine.items()
    said = {choice.name: (choice.value, choice.why) for choice in choices(config, 10_000_000, 8)}
    configured = {name: value for name, (value, why) in said.items() if why == "as configured"}
    assert configured == {
        "gradients accumulate in": "fp32",
        "bucket_elements": "12,345",
        "zero_options.overlap_comm": "true",
        "zero_options.contiguous_gradients": "false",
        "zero_options.reduce_scatter": "false",
    }


def test_a_bucket_that_has_no_effect_is_said_to_have_none() -> None:
    for config in (EngineConfig(zero_stage=0, bucket_elements=99), EngineConfig(precision="bf16", bucket_elements=99)):
        assert "bucket_elements has no effect" in choices(config, 10_000_000, 8)[-1].why


@pytest.mark.parametrize(
    ("options", "shares", "said"),
    [
        ({"round_robin_gradients": True}, 1, "Adam's numbers under wrong names"),
        ({"allgather_bucket_size": 1000}, 1, "has no effect"),
        ({"reduce_bucket_size": 1000}, 1, "is set by another field of engine"),
        ({"contiguous_gradients": False}, 2, "would reduce experts over ranks that hold others"),
        ({"reduce_scatter": False}, 2, "would reduce experts over ranks that hold others"),
        ({"reduce_scatter": "no"}, 2, "would reduce experts over ranks that hold others"),
        ({"cpu_offload": True}, 1, "is set by engine.offload_optimizer"),
        ({"cpu_offload_use_pin_memory": True}, 1, "is set by engine.offload_optimizer"),
        ({"cpu_offload_param": True}, 1, "offload of parameters is not supported"),
        ({"offload_param": {"device": "cpu"}}, 1, "offload of parameters is not supported"),
        ({"zenflow": {"topk_ratio": 0.1}}, 1, "later than the step it belongs to"),
        ({"compute_grad_norm": False}, 1, "clipping and the metric grad_norm need the norm"),
        ({"legacy_stage1": True}, 1, "is of a DeepSpeed that is no more"),
        ({"elastic_checkpoint": True}, 1, "checkpoints are not DeepSpeed's"),
    ],
)
def test_what_deepspeed_would_get_wrong_is_refused(options: dict[str, Any], shares: int, said: str) -> None:
    problems = EngineConfig(zero_stage=1, expert_parallel_size=shares, zero_options=options).problems()
    assert len(problems) == 1
    assert problems[0].startswith(f"zero_options.{next(iter(options))}: ")
    assert said in problems[0]


def test_options_are_judged_at_the_stage_they_are_for() -> None:
    options = {"compute_grad_norm": False, "stage3_max_live_parameters": 10}
    assert read_zero_options(options, stage=2) == ({"compute_grad_norm": False}, [])
    _, problems = read_zero_options(options, stage=3)
    assert len(problems) == 1
    assert problems[0].startswith("zero_options: ")  # of the table as a whole


def test_every_old_name_of_a_zero_option_is_refused() -> None:
    """DeepSpeed moves what a deprecated key says to another one, where nobody has looked at it."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields.items()
    old = [name for name, field in fields if dict(field.json_schema_extra or {}).get("deprecated")]  # type: ignore[arg-type]
    assert len(old) >= 4
    for name in old:
        assert EngineConfig(zero_stage=2, zero_options={name: True}).problems(), name


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"precision": "fp32"}, "fp32"),
        ({"precision": "bf16", "zero_stage": 0}, "bf16"),
        ({"precision": "bf16", "zero_stage": 1}, "fp32"),
        ({"precision": "bf16", "zero_stage": 3}, "fp32"),
        ({"precision": "bf16", "grad_accumulation": "bf16"}, "bf16"),
        ({"precision": "bf16", "reduce_dtype": "bf16"}, "bf16"),
    ],
)
def test_gradients_are_added_up_over_ranks_in_the_type_they_accumulate_in(
    settings: dict[str, Any], expected: str
) -> None:
    config = EngineConfig(**settings)
    table = config.deepspeed_dict(micro_batch_size=1, clip_norm=1.0, zero_table={})
    assert table["communication_data_type"] == expected
    said = {choice.name: choice for choice in choices(config, 10_000_000, 8)}["gradients are reduced in"]
    assert said.value == expected
    assert ("bf16 would halve the bytes" in said.why) == (settings["precision"] == "bf16" and expected == "fp32")
