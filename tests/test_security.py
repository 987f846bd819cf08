"""What SECURITY.md promises: nothing is unpickled unverified, no secret is written, versions have known fixes."""

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import ROOT, run, tiny_config
from trainer.data.config import DataConfig

PACKAGES = ("trainer", "moe", "reweighting", "configs", "launch")
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
SAFE_YAML = {"SafeLoader", "CSafeLoader"}


def unsafe(source: str) -> list[str]:
    """Every use in a module of what runs data as code, one line each."""
    return [f"line {node.lineno}: {what}" for node in ast.walk(ast.parse(source)) for what in _complaints(node)]


def _complaints(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (f"imports {name.name}" for name in node.names if name.name.split(".")[0] in PICKLES)
    elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
        yield f"imports {node.module}"
    elif isinstance(node, ast.Call):
        name, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        short = name.rpartition(".")[2]
        if name in CALLS or name.removeprefix("builtins.") in CALLS:
            yield f"calls {name}"
        if name == "torch.load" and options.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if short in ("load", "load_all", "unsafe_load", "full_load") and name.startswith("yaml."):
            loader = options.get("Loader", ast.unparse(node.args[1]) if len(node.args) > 1 else "")
            if loader.rpartition(".")[2] not in SAFE_YAML:
                yield f"{name} without a safe loader"
        if options.get("allow_pickle", "False") != "False":
            yield f"{name} with allow_pickle"
        if options.get("shell", "False") != "False":
            yield f"{name} through a shell"
        if options.get("trust_remote_code", "False") != "False":
            yield f"{name} with trust_remote_code"
        if short in ("register_new_resolver", "register_resolver"):
            yield "registers a resolver for configurations"


def test_our_code_runs_no_data_as_code() -> None:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 60
    found = [f"{path.relative_to(ROOT)} {line}" for path in files for line in unsafe(path.read_text())]
    assert not found, found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from cloudpickle import loads", "eval(text)", "os.system(command)", "builtins.exec(text)",
        "torch.load(path)", "torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)",
        "yaml.load(text)", "yaml.load(text, Loader=yaml.FullLoader)", "yaml.unsafe_load(text)",
        "np.load(path, allow_pickle=True)", "subprocess.run(command, shell=True)",
        "load_dataset(name, trust_remote_code=True)", "OmegaConf.register_new_resolver('x', f)",
    ],
)  # fmt: skip
def test_the_check_sees(source: str) -> None:
    assert len(unsafe(source)) == 1


@pytest.mark.parametrize(
    "source",
    ["torch.load(path, weights_only=True)", "yaml.safe_load(text)", "yaml.load(text, yaml.SafeLoader)", "model.eval()"],
)
def test_the_check_lets_pass(source: str) -> None:
    assert not unsafe(source)


SECRETS = {
    "WANDB_API_KEY": "feedc0de" * 5,
    "HF_TOKEN": "hf_NeverWriteThisTokenAnywhere0000000",
    "HUGGING_FACE_HUB_TOKEN": "hf_NorThisOlderNameOfIt00000000000",
    "AWS_SECRET_ACCESS_KEY": "NorASecretThatIsNoneOfOurBusiness000000",
}


def test_no_secret_is_written_and_no_foreign_pickle_is_opened(tmp_path: Path, data_config: DataConfig) -> None:
    config = tiny_config(
        tmp_path, data_config,
        train={"steps": 4}, checkpoint={"every": 2}, evaluation={"every": 2}, wandb={"mode": "offline"},
        schedule={"warmup_steps": 1}, engine={"zero_stage": 1},
    )  # fmt: skip
    done = run("launch.train", str(config), **SECRETS)
    assert done.returncode == 0, done.stderr[-2000:]
    run_dir = tmp_path / "run"
    assert list((run_dir / "wandb").rglob("*.wandb")), "W&B did record the run"
    assert (run_dir / "report.html").exists()
    for secret in SECRETS.values():
        assert secret not in done.stdout + done.stderr
    for path in sorted(path for path in run_dir.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for name, secret in SECRETS.items():
            assert secret.encode() not in content, f"{name} is in {path.relative_to(run_dir)}"

    # Somebody puts a pickle that runs a command in the place of a file, and a manifest that fits it.
    newest = max((run_dir / "checkpoints").glob("step-*"))
    assert {path.suffix for path in newest.iterdir()} == {".json", ".safetensors"}
    manifest = json.loads((newest / "MANIFEST.json").read_text())
    file = newest / "optimizer-00000.safetensors"
    file.write_bytes(b"cposix\nsystem\n(S'touch " + str(tmp_path / "pwned").encode() + b"'\ntR.")
    manifest["files"][file.name] = {
        "size": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    (newest / "MANIFEST.json").write_text(json.dumps(manifest))
    resumed = run("launch.train", str(config))
    assert resumed.returncode == 3, resumed.stderr[-2000:]
    assert "optimizer-00000.safetensors: embedding.weight cannot be read" in resumed.stderr
    assert not (tmp_path / "pwned").exists(), "the pickle was not opened"


# The first versions without a published way to run code from data that we hand them; see SECURITY.md.
FLOORS = {"torch": (2, 10), "megatron-core": (0, 15, 3), "datasets": (4, 0), "safetensors": (0, 6)}


@pytest.mark.parametrize("name", FLOORS)
def test_pinned_versions_are_not_older_than_the_fixes(name: str) -> None:
    pinned = re.search(rf"^{name}==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    lowest = re.search(rf'"{name}>=([\d.]+)', (ROOT / "pyproject.toml").read_text())
    assert pinned is not None
    assert lowest is not None
    for found in (pinned[1], lowest[1]):
        assert tuple(map(int, found.rstrip(".").split("."))) >= FLOORS[name]
