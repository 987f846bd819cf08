"""What launch.cluster writes for Slurm, Kubernetes and ssh: refused where it cannot work, valid, and run for real.

The clusters' own commands are stand-ins of a few lines that start one process for each node on this machine.
"""

import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import cluster, dryrun
from launch._cli import run_command
from launch._cluster_slurm import limit_seconds
from launch._cluster_ssh import Host, read_hostfile
from tests.harness import ROOT, environment, losses, rows, tiny_config
from trainer.data.config import DataConfig
from trainer.errors import ConfigError

CPU = ["--nodes", "2", "--cpu-ranks-per-node", "1"]
KINDS = {
    "slurm": ["slurm"],
    "k8s": ["k8s", "--image", "registry/evenkeel:1", "--volume", "shared:/shared"],
}
ON_VOLUME = ["run_dir=/shared/runs/a", "data.path=/shared/tokens"]


def written(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command prints."""
    assert run_command(cluster.main, list(words)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


# --- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_batch_that_does_not_fit_is_refused_as_dryrun_does(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(dryrun.main, ["configs/debug.yaml", "--world-size", "24"]) == 2
    expected = capsys.readouterr().err
    assert "2 x 24 = 48" in expected
    assert run_command(cluster.main, [*KINDS[kind], "configs/debug.yaml", "--nodes", "3"]) == 2
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["slurm", "--nodes", "2", "--cpu-ranks-per-node", "0"], "ranks of a node: 0 must be at least 1"),
        (["slurm", "--nodes", "0"], "--nodes: 0 must be at least 1"),
        (["slurm", *CPU, "--grace", "0"], "--grace: 0 must be at least 1"),
        (["slurm", *CPU, "--max-restarts", "-1"], "--max-restarts: -1 is negative"),
        (["slurm", *CPU, "--port", "80"], "--port: 80 is not a port that a user may open"),
        (["slurm", *CPU, "--env", "WANDB_API_KEY=x"], "--env: WANDB_API_KEY looks like a secret"),
        (["slurm", *CPU, "--env", "NAME"], "--env: 'NAME' is not of the form NAME=VALUE"),
        (["slurm", *CPU, "--env", "A;B=1"], "--env: 'A;B' is not the name of a variable"),
        (["slurm", *CPU, "--time", "1:00:00\n#SBATCH --uid=0"], "--time: '1:00:00"),
        (["slurm", *CPU, "--time", "5"], "--grace: 300 s ahead of a time limit of 5 leaves no time to train"),
        (["slurm", *CPU, "--sbatch", "comment=a b"], "--sbatch: 'comment=a b' must be one word"),
        (["slurm", *CPU, "name=2b"], "must begin with a letter"),
        (["slurm", *CPU, "--out", "/nowhere/job"], "--out: /nowhere/job: No such file or directory"),
        (["k8s", *CPU, "--image", "i"], "--volume: none is given"),
        (["k8s", *CPU, "--image", "i", "--volume", "shared"], "--volume: 'shared' is not of the form CLAIM:/path"),
        (["k8s", *CPU, "--image", "i", "--volume", "s:/shared", "run_dir=/tmp/a"], "run_dir: /tmp/a is on none of the"),
        (["k8s", *CPU, "--image", "i", "--volume", "s:/shared", "data.path=../a"], "data.path: /shared/../a is on"),
        (["k8s", *CPU, "--image", "i", "--volume", "s:/s", f"name={'a' * 60}"], "at most 51 characters"),
    ],
)  # fmt: skip
def test_what_cannot_be_launched_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, *rest = words
    code = run_command(cluster.main, [kind, "configs/debug.yaml", *rest])
    lines = capsys.readouterr().err.splitlines()
    assert code == (6 if "--out" in words else 2)
    assert message in lines[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("# only a comment\n", "names no host"),
        ("a\n", ":1: 'a' is not of the form 'host slots=N'"),
        ("a slots=two\n", ":1: 'a slots=two' is not of the form"),
        ("a slots=8\n\nb slots=0\n", ":3: b has slots=0"),
        ("a slots=8\na slots=8\n", ":2: a is there twice"),
        ("a slots=8\nb slots=4\n", "every host needs the same number of slots, not a 8, b 4"),
        ("-oProxyCommand=x slots=8\n", ":1: '-oProxyCommand=x slots=8' is not of the form"),
        ("a;b slots=8\n", ":1: 'a;b slots=8' is not of the form"),
    ],
)
def test_a_bad_hostfile_says_which_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_hostfile(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_a_hostfile_of_deepspeed_is_read(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# ours\nnode-1 slots=8\n  me@10.0.0.2   slots=8  # the second\n")
    hosts = read_hostfile(path)
    assert hosts == [Host("node-1", 8), Host("me@10.0.0.2", 8)]
    assert hosts[1].address == "10.0.0.2"
    with pytest.raises(ConfigError, match=r"--hostfile: .*none cannot be read"):
        read_hostfile(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("30:15", 1815), ("2:30:15", 9015), ("1-2", 93600), ("1-2:30", 95400), ("1-2:30:15", 95415)],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert limit_seconds(text) == seconds


# --- Slurm ---------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


NASTY = ['data.text_field=it\'s $HOME `id` "q" \\ ; rm *', "data.source=two  blanks\tand 'quotes'"]


def test_the_batch_script_is_clean_bash_and_quotes_every_word(
    tmp_path: Path, on_path: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    listing = tmp_path / "a folder" / "python"
    listing.parent.mkdir()
    listing.write_text('#!/bin/bash\nprintf "%s\\0" "$@" > "$STAND_IN/words-$SLURM_NODEID"\n')
    listing.chmod(0o755)
    options = [
        "--python", str(listing), "--workdir", str(listing.parent), "--env", "GREETING=it's $me",
        "--sbatch", "partition=gpu", "--sbatch=--exclusive", "--sbatch", "nodelist=n[1-2]",
        "--setup", "echo set up", "--interface", "ib0",
    ]  # fmt: skip
    text = written(capsys, "slurm", "configs/debug.yaml", *NASTY, *CPU, *options)
    script = tmp_path / "job.sh"
    script.write_text(text)
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        checked = subprocess.run(
            ["shellcheck", "--severity=warning", script], capture_output=True, text=True, check=False
        )
        assert checked.returncode == 0, checked.stdout
    head = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --nodes=2" in head
    assert "#SBATCH --signal=B:USR1@300" in head
    assert "#SBATCH --partition=gpu" in head
    assert "#SBATCH --exclusive" in head
    assert "#SBATCH --nodelist=n[1-2]" in head
    assert "export GREETING='it'\"'\"'s $me'\n" in text
    assert "gpus" not in text
    assert "export GLOO_SOCKET_IFNAME=ib0\n" in text

    done = subprocess.run(
        ["bash", script], env=environment(**on_path), capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "set up\n"
    for node, is_host in (("0", "true"), ("1", "false")):
        words = (tmp_path / f"words-{node}").read_text().split("\0")[:-1]
        assert words[-3:] == ["configs/debug.yaml", *NASTY]
        assert words[:2] == ["-m", "launch.torchrun"]
        assert f"--rdzv-conf=is_host={is_host},join_timeout=600" in words
        assert "--rdzv-id=17-0" in words
        assert "--rdzv-endpoint=127.0.0.1:29500" in words


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (2, 0, False), (3, 0, False), (4, 0, False), (6, 0, False), (75, 0, False), (5, 0, True),
     (137, 2, True), (5, 3, False)],
)  # fmt: skip
def test_a_job_goes_back_into_the_queue_only_where_that_helps(
    code: int, restarts: int, requeued: bool, tmp_path: Path, on_path: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ending = tmp_path / "python"
    ending.write_text(f"#!/bin/bash\nexit {code}\n")
    ending.chmod(0o755)
    script = written(capsys, "slurm", "configs/debug.yaml", *CPU, "--python", str(ending))
    done = subprocess.run(
        ["bash", "-c", script], env=environment(SLURM_RESTART_COUNT=str(restarts), **on_path), timeout=30, check=False
    )
    assert done.returncode == code
    assert (tmp_path / "scontrol").exists() == requeued


class SlurmJob:
    """A generated script of two nodes, started as Slurm starts it."""

    def __init__(
        self, folder: Path, data: DataConfig, on_path: dict[str, str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.steps, self.run_dir = 150, folder / "run"
        config = tiny_config(
            folder, data, train={"steps": self.steps}, evaluation={"every": 0}, checkpoint={"every": 0}
        )
        self._script, self._env = folder / "job.sh", on_path
        words = ["slurm", str(config), *CPU, "--port", str(free_port()), "--out", str(self._script)]
        assert written(capsys, *words) == ""

    def start(self, **env: str) -> subprocess.Popen[str]:
        pipe, env = subprocess.PIPE, environment(**self._env, **env)
        return subprocess.Popen(["bash", self._script], env=env, stdout=pipe, stderr=pipe, text=True)

    def run_into_the_time_limit(self) -> int:
        """Train until Slurm's warning comes, to the batch shell alone; the number of steps saved."""
        job = self.start()
        deadline = time.monotonic() + 120
        while not ((self.run_dir / "metrics.jsonl").exists() and len(rows(self.run_dir)) > 3):
            assert job.poll() is None, job.communicate()[1][-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        out, err = job.communicate(timeout=120)
        assert job.returncode == 75, err[-3000:]
        assert "exit code 75: back into the queue" in out
        saved = len(losses(self.run_dir))
        assert (self.run_dir / "checkpoints" / f"step-{saved:08d}" / "MANIFEST.json").exists()
        return saved


def test_a_slurm_job_trains_and_saves_at_the_time_limit(
    tmp_path: Path, data_config: DataConfig, on_path: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    job = SlurmJob(tmp_path, data_config, on_path, capsys)
    saved = job.run_into_the_time_limit()
    assert 0 < saved < job.steps
    assert (tmp_path / "scontrol").read_text() == "requeue 17\n"
    assert (tmp_path / "scancel").read_text() == "--signal=TERM 17\n"
    (start,) = [json.loads(line) for line in (job.run_dir / "health.jsonl").read_text().splitlines()]
    assert start["ranks"] == 2


@pytest.mark.slow
def test_a_requeued_slurm_job_goes_on_to_the_end(
    tmp_path: Path, data_config: DataConfig, on_path: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    job = SlurmJob(tmp_path, data_config, on_path, capsys)
    saved = job.run_into_the_time_limit()
    again = job.start(SLURM_RESTART_COUNT="1")
    _, err = again.communicate(timeout=200)
    assert again.returncode == 0, err[-3000:]
    assert f"resumed from step {saved}" in (job.run_dir / "log.txt").read_text()
    assert [row["step"] for row in rows(job.run_dir) if "loss" in row] == list(range(1, job.steps + 1))
    assert (tmp_path / "scontrol").read_text() == "requeue 17\n", "not again"


# --- Kubernetes ----------------------------------------------------------------------------------------------------


def test_the_manifest_is_a_pytorchjob(capsys: pytest.CaptureFixture[str]) -> None:
    text = written(
        capsys, *KINDS["k8s"], "configs/deepseekmoe-1b.yaml", *ON_VOLUME, "--nodes", "8", "--namespace", "team",
        "--wandb-secret", "wandb", "--env", "NCCL_IB_HCA=mlx5",
    )  # fmt: skip
    config_map, job = yaml.safe_load_all(text)
    assert (config_map["apiVersion"], config_map["kind"]) == ("v1", "ConfigMap")
    resolved = yaml.safe_load(config_map["data"]["config.yaml"])
    assert resolved["train"]["global_batch_size"] == 1152
    assert resolved["run_dir"] == "/shared/runs/a"

    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert job["metadata"] == {"name": "deepseekmoe-1b", "namespace": "team"}
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {name: spec["replicas"] for name, spec in replicas.items()} == {"Master": 1, "Worker": 7}
    for spec in replicas.values():
        assert spec["restartPolicy"] == "ExitCode"
        pod = spec["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        assert container["image"] == "registry/evenkeel:1"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
        assert container["ports"] == [{"name": "pytorchjob-port", "containerPort": 29500}]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert pod["terminationGracePeriodSeconds"] > 300
        variables = {each["name"]: each for each in container["env"]}
        assert variables["WANDB_API_KEY"] == {
            "name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "WANDB_API_KEY"}}
        }  # fmt: skip
        assert variables["NCCL_IB_HCA"]["value"] == "mlx5"
        assert variables["POD_IP"]["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"
        subprocess.run(["bash", "-n", "-c", container["command"][2]], check=True)
    assert "is_host=true" in command_of(replicas["Master"])
    assert "is_host=false" in command_of(replicas["Worker"])
    assert "--rdzv-endpoint=deepseekmoe-1b-master-0:29500" in command_of(replicas["Worker"])


def command_of(spec: dict[str, Any]) -> str:
    return str(spec["template"]["spec"]["containers"][0]["command"][2])


def test_one_node_needs_no_workers(capsys: pytest.CaptureFixture[str]) -> None:
    text = written(capsys, *KINDS["k8s"], "configs/deepseekmoe-1b.yaml", *ON_VOLUME, "--nodes", "1")
    _, job = yaml.safe_load_all(text)
    assert list(job["spec"]["pytorchReplicaSpecs"]) == ["Master"]


@pytest.mark.slow
def test_the_pods_train_and_an_evicted_one_asks_to_be_started_again(
    tmp_path: Path, data_config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, data_config, train={"steps": 150}, evaluation={"every": 0}, checkpoint={"every": 0})
    text = written(
        capsys, "k8s", str(config), *CPU, "--image", "i", "--volume", f"shared:{tmp_path}", "--max-restarts", "0",
        "--volume", f"data:{Path(data_config.path).parent}", "--port", str(free_port()), "--python", sys.executable,
    )  # fmt: skip
    config_map, job = yaml.safe_load_all(text)
    (tmp_path / "mounted.yaml").write_text(config_map["data"]["config.yaml"])

    def start(kind: str, rank: int) -> subprocess.Popen[str]:
        script = command_of(job["spec"]["pytorchReplicaSpecs"][kind])
        script = script.replace("tiny-master-0", "127.0.0.1").replace(
            "/etc/evenkeel/config.yaml", shlex.quote(str(tmp_path / "mounted.yaml"))
        )
        # What Kubeflow sets counts pods, not ranks.
        env = environment(POD_IP="127.0.0.1", GLOO_SOCKET_IFNAME="lo") | {
            "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "tiny-master-0", "MASTER_PORT": "23456",
            "PET_NNODES": "2", "PET_NODE_RANK": str(rank), "PET_MASTER_ADDR": "tiny-master-0",
        }  # fmt: skip
        return subprocess.Popen(["bash", "-c", script], env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    def both() -> list[subprocess.Popen[str]]:
        return [start("Master", 0), start("Worker", 1)]

    run_dir = tmp_path / "run"
    pods = both()
    deadline = time.monotonic() + 120
    while not ((run_dir / "metrics.jsonl").exists() and len(rows(run_dir)) > 3):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pods[1].send_signal(signal.SIGTERM)
    errors = [pod.communicate(timeout=120)[1] for pod in pods]
    assert [pod.returncode for pod in pods] == [138, 138], errors[0][-3000:] + errors[1][-3000:]
    pods = both()
    errors = [pod.communicate(timeout=200)[1] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], errors[0][-3000:]
    assert [row["step"] for row in rows(run_dir) if "loss" in row] == list(range(1, 151))


# --- ssh -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ssh_trains_on_every_host_and_stops_them_all(
    tmp_path: Path, data_config: DataConfig, on_path: dict[str, str]
) -> None:
    config = tiny_config(tmp_path, data_config, train={"steps": 150}, evaluation={"every": 0}, checkpoint={"every": 0})
    hostfile = tmp_path / "hosts"
    hostfile.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    line = [sys.executable, "-m", "launch.cluster", "ssh", str(config), "--hostfile", str(hostfile), "--cpu", "--run",
            "--port", str(free_port()), "--max-restarts", "0"]  # fmt: skip

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            line, env=environment(**on_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    run_dir = tmp_path / "run"
    job = start()
    deadline = time.monotonic() + 120
    while not ((run_dir / "metrics.jsonl").exists() and len(rows(run_dir)) > 3):
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 75, out[-3000:] + err[-3000:]
    assert "standard input is closed: the ranks are asked to save and stop" in out
    assert set((tmp_path / "ssh").read_text().split()) == {"127.0.0.1", "localhost"}
    job = start()
    out, err = job.communicate(timeout=200)
    assert job.returncode == 0, out[-3000:] + err[-3000:]
    assert any(line.startswith("127.0.0.1: ") for line in out.splitlines())
    assert [row["step"] for row in rows(run_dir) if "loss" in row] == list(range(1, 151))

    hostfile.write_text("unreachable slots=1\nlocalhost slots=1\n")
    job = start()
    out, err = job.communicate(timeout=120)
    assert job.returncode == 5
    assert "ssh to unreachable failed" in err


def test_ssh_prints_a_command_for_each_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("me@node-1 slots=1\nnode-2 slots=1\n")
    text = written(capsys, "ssh", "configs/debug.yaml", *NASTY, "--hostfile", str(hostfile), "--workdir", "/a b")
    lines = [block.split("\n", 1) for block in text.strip().split("\n\n")]
    assert [head for head, _ in lines] == ["# me@node-1", "# node-2"]
    for (_, command), host, is_host in zip(lines, ["me@node-1", "node-2"], ["true", "false"], strict=True):
        ssh, where, remote = shlex.split(command)
        assert (ssh, where) == ("ssh", host)
        bash, flag, script = shlex.split(remote)
        assert (bash, flag) == ("bash", "-c")
        subprocess.run(["bash", "-n", "-c", script], check=True)
        assert "cd '/a b' || exit 6" in script
        assert "--rdzv-endpoint=node-1:29500" in script
        assert f"is_host={is_host}," in script
        assert shlex.join(NASTY) in script
