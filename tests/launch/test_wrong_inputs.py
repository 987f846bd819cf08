"""Every wrong input gets one clear line, the right exit code, and destroys nothing."""

import json
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from launch import data, dryrun, evaluate, prepare, theory, torchrun, train
from launch._cli import run_command
from tests.harness import ROOT, command, deterministic, environment, run, tiny_config
from trainer.data.config import DataConfig

# override -> what the line must say
BAD_VALUES = {
    "model.top_kk=2": "Did you mean: 'top_k'",
    "trian.steps=5": "Did you mean: 'train'",
    "train.steps=many": "Value 'many' of type 'str' could not be converted to Integer",
    "train.steps=3.7": "could not be converted to Integer",
    "train.steps=???": "train.steps: ??? is OmegaConf's word for no value at all",
    "train.steps={}": "train.steps: must be one value, not a table",
    "train=5": "train: must be a table, not 5",
    "data.domains=[1]": "data.domains: must be a table, not a list",
    "data.weights=[1]": "data.weights: must be a table, not a list",
    "data.weights={code: [1]}": "data.weights.code: must be one value, not a list",
    "data.phases={}": "data.phases: must be a list, not a table",
    "data.phases=[3]": "data.phases[0]: must be a table, not 3",
    "data.phases=[{weights: [1]}]": "data.phases[0].weights: must be a table, not a list",
    "profile.trace_steps=[a]": "profile.trace_steps: an entry of ['a'] could not be converted to Integer",
    "hooks=[1]": "hooks: must be a table, not a list",
    "hooks.expert_bias.rule=???": "hooks.expert_bias.rule: ??? is",
    "hooks.expert_bias.options=[1]": "hooks.expert_bias.options: must be a table, not a list",
    "optimizer.learning_rate=true": "optimizer.learning_rate",
    "health.slow_factor=1": "slow_factor: 1.0 must be above 1",
    "health.max_clock_skew_s=0": "max_clock_skew_s: 0.0 must be a positive number",
    "health.min_bandwidth_gb_s=-1": "min_bandwidth_gb_s: -1.0 must not be negative",
    "optimizer.learning_rate=nan": "must be finite and positive",
    "optimizer.learning_rate=-1": "must be finite and positive",
    "model.top_k=9": "top_k: 9 must be between 1 and num_experts (8)",
    "model.uniform_routing=true": "model.uniform_routing: deals tokens in turn",
    "model={num_dense_layers: 3, aux_loss: {global_batch: 0.01}}": "model.aux_loss: is of routers",
    "model={num_dense_layers: 3, router_jitter: 0.1}": "model.router_jitter: is of routers",
    "model={num_dense_layers: 3, capacity_factor: 1.5}": "model.capacity_factor: is of routers",
    "model={num_dense_layers: 3, uniform_routing: true}": "model.uniform_routing: is of routers",
    "model.top_k=1": "model.top_k: 1 with normalize_gates makes every gate 1",
    "model={num_heads: 12, num_kv_heads: 12}": "num_heads: 12 does not divide hidden_size (32)",
    "model.num_kv_heads=3": "num_kv_heads: 3 does not divide num_heads (4)",
    "model.layer_experts=[0,8]": "layer_experts: has 2 entries for num_layers 3",
    "model.layer_experts=[0,eight,8]": "model.layer_experts",
    "model.layer_experts=[0,4,16]": "num_experts: 8 is that of no block in layer_experts",
    "hooks.expert_bias.gap_tokens=-1": "gap_tokens: -1 is negative",
    "hooks.expert_bias={rule: quantile, count: weight}": "count: rule quantile does not move by loads",
    "hooks={expert_bias: {count: weight}, sample_reweight: {enabled: false}}": "needs a hook that sets 'weights'",
    "hooks.sample_reweight.strategy=linuper": "did you mean 'linupper'",
    "hooks.sample_reweight.frozen.tolerance=0.1": "frozen: is read only with train.accumulation frozen",
    "hooks.sample_reweight={strategy: quadratic, alpha: 2.0}": "alpha: strategy quadratic does not depend on it",
    "hooks.sample_reweight.cap=0.5": "cap: 0.5 must be at least 1",
    "hooks.sample_reweight.ess_floor=1": "ess_floor: 1.0 must be in [0, 1)",
    "hooks.sample_reweight.reference.quantile=0.2": "minmax does not read it",
    "hooks.sample_reweight.temperature.final=0.5": "shape constant does not read it",
    "hooks.sample_reweight.temperature.shape=linear": "final: 0.0 must be finite and positive",
    "hooks.token_reweight.b1=1.0": "b1: focal does not read it",
    "hooks.domain_reweight.rule=static": "weights: rule static needs the weight of each domain",
    "model.attention=mha": "model.attention",
    "model.mla.kv_lora_rank=16": "mla: is not read with attention gqa",
    "model={attention: mla, num_kv_heads: 4, mla: {kv_lora_rank: 8, qk_nope_head_dim: 8, qk_rope_head_dim: 4}}":
        "mla.v_head_dim: must be at least 1 with attention mla",
    "init_from=/nowhere": "init_from: /nowhere is no folder",
    "model.num_groups=3": "num_groups: 3 does not divide num_experts (8)",
    "model.expert_intermediate_size=20": "20 must be a positive multiple of 8",
    "train.global_batch_size=7": "not divisible by micro_batch_size x ranks = 2 x 1 = 2",
    "schedule.warmup_steps=99": "warm-up and decay take 99 steps, the run has 12",
    "engine.zero_stage=7": "zero_stage: 7 does not exist",
    "engine.precision=fp8": "engine.precision",
    "engine.grad_accumulation=bf16": "bf16 with precision fp32",
    "engine.zero_options.overlap_com=true": "zero_options.overlap_com",
    "hooks.expert_bais.rule=sign": "unknown hook 'expert_bais'; did you mean 'expert_bias'",
    "hooks.expert_bias.rte=0.1": "Did you mean: 'rate'",
    "hooks.expert_bias.options.kappa=3": "options.kappa: rule sign does not read it",
    "hooks.expert_bias={rule: quantile, schedule: {shape: cosine}}": "quantile has no rate to schedule",
    "hooks.expert_bias.schedule.zero_last=1": "zero_last: 1.0 must be in [0, 1)",
    "model.aux_loss.z=-1": "aux_loss.z: -1.0 must be finite and not negative",
    "model.drop_by=position": "nothing is dropped with capacity_factor 0",
    "model.capacity_factor=nan": "capacity_factor: nan must be finite",
    "engine={expert_parallel_size: 2, zero_stage: 1}": "2 does not divide the number of ranks (1)",
    "engine.expert_parallel_size=0": "expert_parallel_size: 0 must be at least 1",
    "engine.sequence_parallel_size=0": "sequence_parallel_size: 0 must be at least 1",
    "engine.sequence_parallel_size=2": "sequence_parallel_size: 2 does not divide the number of ranks (1)",
    "engine.offload_optimizer=true": "offload_optimizer: DeepSpeed has no offload at zero_stage 0",
    "engine.zero_options.round_robin_gradients=true": "Adam's numbers under wrong names",
    "engine.reduce_dtype=bf16": "bf16 with precision fp32",
    "engine.collective_timeout_s=1e300": "collective_timeout_s: 1e+300 must be a positive number of seconds, at most",
    "engine.collective_timeout_s=nan": "collective_timeout_s: nan must be a positive number",
    "engine.bucket_elements=-1": "bucket_elements: -1 is negative",
    "engine.zero_options.offload_optimizer.device=cpu": "offload_optimizer: is set by another field of engine",
    "engine.zero_options.cpu_offload=true": "cpu_offload: is set by engine.offload_optimizer",
    "engine={zero_stage: 2, zero_options: {compute_grad_norm: false}}": "clipping and the metric grad_norm need",
    "hooks.expert_bias.rate=-1": "rate: -1.0 must be finite and not negative",
    "hooks.mine.hook=no_such_module:Hook": "cannot import no_such_module",
    "hooks.mine.hook=json:dumps": "is not a subclass of trainer.hooks.Hook",
    "hooks.mine.hook=tests.dist.hooks:SecondOwner": "'weights' is already owned by hooks.sample_reweight",
    "hooks.mine={hook: 'tests.dist.hooks:Poison', kind: loss, first: 1, last: 2, rnk: 0}": "did you mean 'rank'",
    'name="a\\nb"': "name: 'a\\nb' cannot name a folder; use letters, digits, '.', '+', '-' and '_'",
    "name='lr[bold]'": "name: 'lr[bold]' cannot name a folder",
    "name=../x": "name: '../x' cannot name a folder",
    "name=${oc.env:HOME}": "interpolation (${...}) is not supported",
    "data.weights.prosa=1.0": "data.weights.prosa: no such domain",
    "data.phases=[{from_step: 3, from_share: 0.5}]": "phases[0].from_step: give exactly one of from_step, from_sample",
    "data.phases=[{from_stp: 3}]": "Did you mean one of: 'from_step'",
    "data.phases=[{from_share: 1.0}]": "phases[0].from_share: 1.0 must be between 0 and 1",
    "data.phases=[{from_step: 0}]": "phases[0].from_step: 0 must be at least 1; what comes first is data.weights",
    "data.phases=[{from_step: 3, weights: {code: -1}}]": "phases[0].weights.code: -1.0 must be finite and not negative",
    "data.phases=[{from_step: 3, weights: {prosa: 1}}]": "data.phases[0].weights.prosa: no such domain",
    "data.phases=[{from_step: 6}, {from_share: 0.5}]": "phases[1]: begins with sample 48, not after phase 0",
    "data.max_epochs.code=-1": "max_epochs.code: -1.0 must be finite and not negative",
    "data.max_epochs.prosa=2": "data.max_epochs.prosa: no such domain",
    "data={weights: {code: 1}, max_epochs: {code: 0.001}}": "wants 96 samples, the caps allow 10 (at most code 10)",
    "data.prefetch_steps=0": "prefetch_steps: 0 must be at least 1",
    "data.prefetch_steps=9": "sampling_delay: 4 must be at least prefetch_steps (9)",
    "hooks.domain_reweight={target: sampling, weights: {code: 1}}": "fixed weights of the sampling are data.weights",
    "train.sequence_length=10000000": "no domain has 10000001 training tokens",
    "train.verify_every=-1": "verify_every: -1 is negative; use 0 to compare ranks only at checkpoints",
    "checkpoint.keep=0": "keep: 0 would delete the only checkpoint",
    "data.vocab_size=400": "was prepared with 320, not 400",
    "data.packing=best_fit": "set model.document_mask to true",
    "data.packing=worst_fit": "data.packing",
    "wandb.mode=loud": "wandb.mode",
    "profile.trace_steps=[5000]": "profile.trace_steps: 5000 is beyond the last step",
    "profile.slow_rank_factor=0.5": "must be above 1",
}  # fmt: skip


@pytest.mark.fault(21, "wrong configuration")
@pytest.mark.parametrize("override", BAD_VALUES)
def test_bad_value_is_one_line_and_exit_2(
    override: str, tmp_path: Path, data_config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, data_config)
    assert run_command(train.main, [str(config), override]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert BAD_VALUES[override].lower() in lines[0].lower()
    assert not (tmp_path / "run").exists(), "no run folder before the configuration is right"


def test_all_errors_are_listed_at_once(
    tmp_path: Path, data_config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, data_config)
    assert run_command(train.main, [str(config), "model.top_k=9", "train.global_batch_size=7", "optimizer.eps=0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert run_command(train.main, [str(config), "model.top_kk=9", "trian.steps=7"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "is not valid YAML"),
        ("seed: 1\nseed: 2\n", "is not valid YAML"),
        ("- 1\n", "must hold keys and values"),
        ("include: other.yaml\n", "include: must be a list"),
        ("include: [config.yaml]\n", "includes itself"),
        ("include: [nowhere.yaml]\n", "no such config file"),
    ],
)
def test_bad_file_is_one_line_and_exit_2(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert run_command(train.main, [str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_missing_config_names_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(train.main, ["nowhere.yaml"]) == 2
    assert "quickstart" in capsys.readouterr().err


def test_unprepared_corpus(tmp_path: Path, data_config: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path, data_config, data={"path": str(tmp_path / "none")})
    assert run_command(train.main, [str(config)]) == 2
    assert "run python -m launch.prepare CONFIG first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "does not exist"),
        ("empty.jsonl", b"", "has no document"),
        ("blank.txt", b"", "has no document"),
        ("bytes.txt", b"caf\xe9 \xff\xfe", "UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "cannot be read as json"),
        ("numbers.jsonl", b'{"text": 17}\n', "row 1: field 'text' holds int, not text"),
        ("null.jsonl", b'{"text": "a"}\n{"text": null}\n', "row 2: field 'text' holds NoneType, not text"),
        ("other.jsonl", b'{"body": "a"}\n', "has no field 'text' (fields: body)"),
        ("picture.png", b"\x89PNG", "has no .jsonl"),
        (
            "my texts.v2.jsonl",
            b'{"text": "a"}\n',
            "has no field 'domain', so its domain is called after the file, but 'my",
        ),
        ("my notes.txt", b"a", "so its domain is called after the file, but 'my notes' cannot name a domain"),
        ("domain.jsonl", b'{"text": "a", "domain": "../x"}\n', "cannot name a domain"),
    ],
)
def test_bad_corpus_is_one_line_and_exit_2(
    name: str, content: bytes | None, message: str, tmp_path: Path, data_config: DataConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = tmp_path / name
    if content is not None:
        source.write_bytes(content)
    config = tiny_config(tmp_path, data_config, data={"source": str(source), "path": str(tmp_path / "prepared")})
    assert run_command(prepare.main, [str(config)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0]
    left = {path.name for path in tmp_path.iterdir()} - {name, "config.yaml", ".prepared.lock"}
    assert not left, "nothing is left behind"


def test_dryrun_refuses_a_layout(tmp_path: Path, data_config: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path, data_config)
    assert run_command(dryrun.main, [str(config), "--world-size", "3"]) == 2
    assert "2 x 3 = 6" in capsys.readouterr().err


def test_expert_parallelism_is_checked_for_every_layer(
    tmp_path: Path, data_config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, data_config, engine={"expert_parallel_size": 4, "zero_stage": 1})
    layers = ["model.num_layers=4", "model.layer_experts=[0,8,6,10]"]
    assert run_command(dryrun.main, [str(config), "--world-size", "4", *layers]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "expert_parallel_size: 4 does not divide an entry of model.layer_experts (6)" in lines[0]
    assert "(10)" in lines[1]
    assert run_command(dryrun.main, [str(config), "--world-size", "4", layers[0], "model.layer_experts=[0,8,4,0]"]) == 0


BIG = "12345678901234567890123"


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (evaluate.main, ["nowhere", "--max-rows", "-1"], "--max-rows: -1 is negative; use 0 for all"),
        (torchrun.main, ["--nproc_per_node=x", "train.py"], "torchrun: Unsupported nproc_per_node value: x"),
        (torchrun.main, ["--nproc_per_node=0", "train.py"], "--nproc_per_node: 0 must be at least 1"),
        (theory.main, ["--out", "nowhere", "--seed", BIG], f"--seed: {BIG} must be in [0, 2^32)"),
        (data.main, ["show", "CONFIG", "--samples", f"0,{BIG}"], f"--samples: {BIG} is more than 2^40"),
        (data.main, ["audit", "CONFIG", "--samples", BIG], f"--samples: {BIG} must be at least 1, and at most 2^40"),
    ],
)
def test_bad_option_is_one_line_and_exit_2(
    main: Callable[[list[str]], int], arguments: list[str], message: str, tmp_path: Path, data_config: DataConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = str(tiny_config(tmp_path, data_config))
    assert run_command(main, [config if each == "CONFIG" else each for each in arguments]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.fault(21, "wrong configuration under torchrun")
def test_errors_reach_the_caller_through_torchrun(tmp_path: Path, data_config: DataConfig) -> None:
    config = tiny_config(tmp_path, data_config)
    done = run("launch.train", str(config), "model.top_k=9", ranks=2)
    assert done.returncode == 2
    ours = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(ours) == 1, "two ranks, one line"


def test_rank_0_has_time_to_say_what_all_have_found(tmp_path: Path) -> None:
    """The launcher ends the others when the first rank leaves; if that was not rank 0, nobody would say why."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, sys, time\n"
        "from launch._cli import run_command\n"
        "from trainer.errors import ConfigError\n"
        "def main(argv):\n"
        "    time.sleep(0.5 if os.environ['RANK'] == '0' else 0)\n"
        "    raise ConfigError('it is like this')\n"
        "sys.exit(run_command(main))\n"
    )
    launcher = [sys.executable, "-m", "launch.torchrun", "--standalone", "--nproc_per_node=2", str(worker)]
    done = subprocess.run(
        launcher, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    ours = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert ours == ["error (rank 0): it is like this"]


@pytest.mark.fault(30, "port taken")
def test_port_taken_is_exit_5_with_the_address(tmp_path: Path, data_config: DataConfig) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run(
            "launch.train", str(tiny_config(tmp_path, data_config)),
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )  # fmt: skip
    assert done.returncode == 5
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error")
    assert f"127.0.0.1:{port}" in last


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data_config: DataConfig) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    done = run("launch.train", str(tiny_config(folder, data_config)))
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def copy_of(trained: Path, target: Path) -> list[str]:
    shutil.copytree(trained / "run", target / "run")
    return [str(trained / "config.yaml"), f"run_dir={target / 'run'}"]


def config_of(folder: Path) -> dict[str, object]:
    tree: dict[str, object] = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    return tree


@pytest.mark.fault(22, "another model at resume")
def test_checkpoint_of_another_model_is_exit_3(trained: Path, tmp_path: Path) -> None:
    done = run("launch.train", *copy_of(trained, tmp_path), "model.num_experts=4")
    assert done.returncode == 3
    assert "model.num_experts: 8 -> 4" in done.stderr.splitlines()[-1]
    assert deterministic(tmp_path / "run") == deterministic(trained / "run"), "the metrics of the old run are intact"
    assert config_of(tmp_path) == config_of(trained), "and its settings, by which its checkpoints are read"


@pytest.mark.fault(7, "one damaged, then every one")
def test_damaged_checkpoint_falls_back_and_two_are_exit_3(trained: Path, tmp_path: Path) -> None:
    arguments = copy_of(trained, tmp_path)
    newest, older = sorted((tmp_path / "run" / "checkpoints").glob("step-*"), reverse=True)
    flip_a_bit(newest / "model.safetensors")
    done = run("launch.train", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "checkpoint rejected" in done.stderr
    assert f"resumed from step {int(older.name[5:])}" in done.stderr
    assert deterministic(tmp_path / "run") == deterministic(trained / "run"), "the lost steps came out the same"

    newest, older = sorted((tmp_path / "run" / "checkpoints").glob("step-*"), reverse=True)
    flip_a_bit(newest / "state.json")
    (older / "MANIFEST.json").write_text("{}")
    done = run("launch.train", *arguments, "optimizer.learning_rate=1e-4")
    assert done.returncode == 3
    assert config_of(tmp_path) == config_of(trained) | {"run_dir": str(tmp_path / "run")}
    assert "no intact checkpoint" in done.stderr.splitlines()[-1]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.fault(8, "file too large in save (RLIMIT_FSIZE)")
def test_no_space_left_is_exit_6_and_keeps_the_old_checkpoint(trained: Path, tmp_path: Path) -> None:
    arguments = copy_of(trained, tmp_path)
    before = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    largest = max(path.stat().st_size for path in (trained / "run" / "checkpoints").rglob("*") if path.is_file())

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2))

    done = subprocess.run(
        command("launch.train", *arguments, "train.steps=16"),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120,
        preexec_fn=limit_file_size, check=False,
    )  # fmt: skip
    assert done.returncode == 6, done.stderr[-2000:]
    assert "cannot write the checkpoint of step 16" in done.stderr.splitlines()[-1]
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == before


@pytest.mark.fault(23, "corpus truncated")
def test_changed_corpus_is_exit_3(trained: Path, tmp_path: Path, data_config: DataConfig) -> None:
    corpus = tmp_path / "prepared"
    shutil.copytree(data_config.path, corpus)
    shard = sorted(corpus.glob("*-train.bin"))[0]
    shard.write_bytes(shard.read_bytes()[:-2])
    done = run("launch.train", *copy_of(trained, tmp_path), f"data.path={corpus}")
    assert done.returncode == 3
    assert shard.name in done.stderr.splitlines()[-1]


@pytest.mark.fault(27, "run folder locked")
def test_run_folder_in_use_is_exit_3(trained: Path, tmp_path: Path) -> None:
    import fcntl

    arguments = copy_of(trained, tmp_path)
    with (tmp_path / "run" / ".lock").open("w") as lock:
        lock.write("process 1 on elsewhere")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run("launch.train", *arguments)
    assert done.returncode == 3
    assert "is in use by process 1 on elsewhere" in done.stderr.splitlines()[-1]


def test_a_finished_run_started_again_does_nothing(trained: Path, tmp_path: Path) -> None:
    done = run("launch.train", *copy_of(trained, tmp_path))
    assert done.returncode == 0
    assert deterministic(tmp_path / "run") == deterministic(trained / "run")
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 12
