"""What the README tells a reader to do works as written."""

import json
import re
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from tests.harness import ROOT, rows, run
from trainer.data.config import DataConfig

README = (ROOT / "README.md").read_text()
HOOKS = (ROOT / "trainer" / "HOOKS.md").read_text()


def block(language: str) -> str:
    text = HOOKS[HOOKS.index("<!-- the test suite runs exactly this text -->") :]
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_example_hook_runs_as_printed(tmp_path: Path, data_config: DataConfig) -> None:
    assert block("python").count("\n") <= 32
    (tmp_path / "outliers.py").write_text(block("python"))
    (tmp_path / "mine.yaml").write_text(block("yaml"))
    shutil.copytree(ROOT / "configs", tmp_path / "configs", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    data = [
        f"data.path={data_config.path}", f"data.source={data_config.source}",
        f"data.vocab_size={data_config.vocab_size}", f"data.heldout_fraction={data_config.heldout_fraction}",
    ]  # fmt: skip
    done = run("launch.train", "mine.yaml", *data, ranks=2, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 0, done.stderr[-2000:]

    run_dir = tmp_path / "runs" / "with-outliers"
    training = [row for row in rows(run_dir) if "loss" in row]
    assert len(training) == 20
    assert all("outliers/count" in row for row in training)
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["hooks"]["outlier_watch"]["sigmas"] == 2.0
    state = json.loads((run_dir / "checkpoints" / "step-00000020" / "state.json").read_text())
    assert "outlier_watch" in state["hooks"]

    help_rows = run("launch.compare", str(run_dir), str(run_dir))
    assert help_rows.returncode == 0
    evaluated = run("launch.evaluate", str(run_dir), cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert evaluated.returncode == 0, evaluated.stderr[-2000:]
    assert "eval/maxvio_global" in evaluated.stdout


def test_every_command_of_the_readme_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    commands = set(re.findall(r"-m (launch\.\w+)", README)) - {"launch.torchrun"}
    assert {"launch.prepare", "launch.train", "launch.dryrun", "launch.evaluate", "launch.compare"} <= commands
    for name in sorted(commands):
        with pytest.raises(SystemExit, match="0"):
            import_module(name).main(["--help"])
        assert f"python -m {name}" in capsys.readouterr().out


def test_presets_are_valid_where_they_are_meant_to_run() -> None:
    from configs.loader import load_run_config, to_yaml

    for path, world_size in [
        ("quickstart", 2), ("quickstart", 1), ("debug", 2), ("deepseekmoe-1b", 64), ("deepseekmoe-1b", 8),
        ("16b-a3b", 128), ("qwen3-30b-a3b", 256), ("deepseekmoe-3b", 64), ("reweighting-124m", 8),
    ]:  # fmt: skip
        config = load_run_config(ROOT / "configs" / f"{path}.yaml", world_size=world_size)
        assert config.name == path
        assert "hooks" in to_yaml(config)
