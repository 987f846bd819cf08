"""When memory runs out the user is told what to change."""

from pathlib import Path

import pytest
import torch

from configs.loader import load_run_config
from launch._cli import run_command
from launch._out_of_memory import advice, explained_out_of_memory


def test_an_allocation_that_is_refused_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str]) -> int:
        with explained_out_of_memory(load_run_config("configs/debug.yaml", []), tmp_path):
            torch.empty(2**46)
        return 0

    assert run_command(main, []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory: ")
    assert "you tried to allocate 281474976710656 bytes" in line
    assert "train.micro_batch_size=1 (the same batch in more pieces), model.activation_recompute=selective" in line


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="boom"),
        explained_out_of_memory(load_run_config("configs/debug.yaml", []), tmp_path),
    ):
        raise RuntimeError("boom")


@pytest.mark.parametrize(
    ("overrides", "ranks", "first"),
    [
        (["train.accumulation=deferred"], 1, "train.accumulation=auto"),
        (["train.micro_batch_size=1"], 2, "model.activation_recompute=selective"),
        (["train.micro_batch_size=1", "model.activation_recompute=selective"], 2, "model.activation_recompute=block"),
        (["train.micro_batch_size=1", "model.activation_recompute=block"], 2, "engine.zero_stage=2"),
        (["train.micro_batch_size=1", "model.activation_recompute=block", "engine.zero_stage=2"], 2, "engine.zero_stage=3"),  # noqa: E501
        (["train.micro_batch_size=1", "model.activation_recompute=block"], 1, "more ranks"),
        (["train.micro_batch_size=1", "model.compile=true"], 2, "model.activation_recompute=block"),
        (["train.micro_batch_size=1", "model.compile=true", "model.activation_recompute=block", "engine.zero_stage=2"], 2, "engine.zero_stage=3 with model.compile=false"),  # noqa: E501
    ],
)  # fmt: skip
def test_advice_names_what_is_not_yet_done(overrides: list[str], ranks: int, first: str) -> None:
    assert advice(load_run_config("configs/debug.yaml", overrides), ranks).startswith(f"try, in this order: {first}")
