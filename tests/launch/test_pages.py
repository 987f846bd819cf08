"""Every command, key and block of configuration that a page shows is one that there is; the cheap ones are run."""

import dataclasses
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from configs.loader import load_run_config
from configs.schema import SECTIONS, RunConfig
from launch._cli import run_command
from tests.harness import ROOT, run, tiny_config
from tests.launch.pages import PAGES, Command, check, commands
from tests.launch.run_folders import evaluation, training_rows, write_grid, write_run
from trainer.data.config import DataConfig
from trainer.errors import ConfigError
from trainer.registry import find_hook

# The commands of the other pages are run by tests of their own: test_ablate, test_cluster_page, test_predict,
# test_report, test_readme (HOOKS) and tests/outside.
RUN_HERE = (
    "README.md", "moe/README.md", "reweighting/README.md", "trainer/LAYOUTS.md", "trainer/MONITORING.md",
    "trainer/RELIABILITY.md", "trainer/data/README.md",
)  # fmt: skip
CHEAP = (
    "launch.checkpoint", "launch.cluster", "launch.compare", "launch.data", "launch.dryrun", "launch.evaluate",
    "launch.export", "launch.from_hf", "launch.report", "launch.reweight_lab", "launch.theory", "launch.watch",
    "launch.wandb",
)  # fmt: skip
SERVED = ("launch.wandb", "sync")  # needs a server: test_wandb_command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, data_config: DataConfig) -> Path:
    """A folder in which what the pages name is there, as after the quickstart, but small."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("pages")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "hosts").write_text("node-1 slots=8\n")
    tiny = tiny_config(
        folder / "origin", data_config, run_dir="runs/quickstart",
        hooks={"sample_reweight": {"strategy": "linupper", "record_every": 4}},
    )  # fmt: skip
    for name in ("tiny", "proxy", "mine"):
        shutil.copy(tiny, folder / f"{name}.yaml")
    done = run("launch.train", "tiny.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("a", "b"):
        write_run(folder / "runs" / name, [*training_rows(5), evaluation(5, 3.0)], steps=5)
    write_grid(folder / "runs" / "my-grid", {"a": [4.0, 4.1], "b": [3.0, 3.2]})
    dense = transformers.Qwen3Config(
        vocab_size=96, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(dense).save_pretrained(folder / "Qwen3-0.6B")
    return folder


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if commands(text)])
def test_commands_take_what_the_page_gives_them(
    page: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    for command in commands(PAGES[page]):
        if command.module == "launch.data":  # reads its arguments in two goes: run below
            continue
        try:
            check(command)
        except (SystemExit, ConfigError) as error:
            pytest.fail(f"{page}: {command}: {error} {capsys.readouterr().err}")


@pytest.mark.parametrize("page", RUN_HERE)
def test_commands_that_are_cheap_run(
    page: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    number = 0
    for module, words in commands(PAGES[page]):
        if module not in CHEAP or (module, words[0]) == SERVED:
            continue
        number += 1
        given = [{"DIR": f"made-{number}", "FILE": f"made-{number}.yaml"}.get(word, word) for word in words]
        if module == "launch.cluster" and "tiny.yaml" in given:
            given += ["--cpu-ranks-per-node", "1"]
        if module == "launch.theory":  # as much as shows that it runs
            given += ["--steps", "20", "--tokens", "64"]
        assert run_command(import_module(module).main, given) == 0, f"{module} {given}: {capsys.readouterr().err}"


def test_the_pages_have_commands() -> None:
    found = {page: commands(text) for page, text in PAGES.items()}
    assert sum(map(len, found.values())) > 60
    assert all(found[page] for page in RUN_HERE)
    assert Command("launch.data", ["audit", "tiny.yaml"]) in found["README.md"]
    assert Command("launch.wandb", ["workspace", "tiny.yaml"]) in found["README.md"]
    torchrun = ["--nproc_per_node=2", "-m", "launch.train", "tiny.yaml", "seed=1"]
    assert Command("launch.torchrun", torchrun) in found["README.md"]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("python -m launch.dryrun configs/debug.yaml --world 2 --sizes 3", SystemExit),
        ("python -m launch.dryrun configs/debug.yaml trian.steps=2", ConfigError),
        ("python -m launch.profile configs/nothing.yaml", ConfigError),
        ("python -m launch.cluster slurm configs/debug.yaml --nodes 2 --image x", SystemExit),
        ("python -m launch.wandb synch RUN", SystemExit),
        ("python -m launch.ablate configs/grids/nothing.yaml", ConfigError),
        ("torchrun --nproc_per_node=3 -m launch.train configs/debug.yaml", ConfigError),
        ("torchrun --nproc_per_nodes=3 -m launch.train configs/debug.yaml", SystemExit),
    ],
)
def test_a_command_that_is_wrong_is_found(line: str, error: type[BaseException]) -> None:
    (command,) = commands(f"```\n{line}\n```\n")
    with pytest.raises(error):
        check(command)


def exists(key: str) -> bool:
    """Whether the schema, or the hook's own configuration, has the key."""
    names = key.split(".")
    at: Any = RunConfig()
    if names[0] == "hooks":
        at, names = find_hook(names[1]), names[2:]
        at, names = (at.Config(), names) if names and dataclasses.is_dataclass(at.Config) else (at, names)
    for name in names:
        if isinstance(at, dict):
            return True  # options of DeepSpeed, and the like
        if not hasattr(at, name):
            return False
        at = getattr(at, name)
    return True


@pytest.mark.parametrize("page", PAGES)
def test_keys_are_those_of_the_schema(page: str) -> None:
    spans = re.findall(r"`([^`\n]+)`", PAGES[page])
    keys = [found[1] for span in spans if (found := re.fullmatch(r"((?:\w+\.)+\w+)(?:(?:=|: ).+)?", span))]
    named = [
        key
        for key in keys
        if key.split(".")[0] in (*SECTIONS, "hooks") and not key.endswith((".jsonl", ".html", ".py"))
    ]
    assert [key for key in named if not exists(key)] == []


def test_a_key_that_there_is_not_is_found() -> None:
    assert exists("train.spikes.policy")
    assert exists("hooks.expert_bias.count")
    assert not exists("train.spikes.polici")
    assert not exists("hooks.expert_bias.counts")


BLOCKS = [
    (page, block)
    for page, text in PAGES.items()
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    if page not in ("launch/ABLATIONS.md", "trainer/HOOKS.md")  # run by test_ablate and test_readme
]


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_blocks_of_configuration_load(page: str, block: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (tmp_path / "configs" / "block.yaml").write_text(block)
    (tmp_path / "configs" / "whole.yaml").write_text("include: [debug.yaml, block.yaml]\n")
    load_run_config(tmp_path / "configs" / "whole.yaml", world_size=None)
