"""A manifest for Kubernetes: a PyTorchJob of Kubeflow's training operator, and the resolved configuration beside it."""

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from configs.loader import to_yaml
from launch._cluster_plan import WAIT_FOR_CHILD, Plan, job_name
from trainer.errors import ConfigError

_CONFIG_FOLDER = "/etc/evenkeel"
CONFIG_PATH = f"{_CONFIG_FOLDER}/config.yaml"
"""Where every pod finds the configuration."""
_LONGEST_NAME = 63 - len("-worker-9999")


@dataclass(frozen=True, kw_only=True)
class KubernetesOptions:
    """What only Kubernetes knows."""

    image: str
    namespace: str
    volumes: tuple[tuple[str, str], ...]
    """(persistent volume claim, path in the pods)."""
    wandb_secret: str
    """Name of a Secret whose entry WANDB_API_KEY is the key; empty for none."""
    interface: str


def manifest(plan: Plan, options: KubernetesOptions) -> str:
    """ConfigMap and PyTorchJob, as two YAML documents. Raises ConfigError if pods would not share the run folder."""
    name = job_name(plan.config.name, _LONGEST_NAME)
    _require_shared(plan, options)
    metadata = {"name": name} | ({"namespace": options.namespace} if options.namespace else {})
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata | {"name": f"{name}-config"},
        "data": {"config.yaml": to_yaml(plan.config)},
    }
    replicas = {"Master": _replica(plan, options, name, 1, is_host="true")}
    if plan.agents.nodes > 1:
        replicas["Worker"] = _replica(plan, options, name, plan.agents.nodes - 1, is_host="false")
    job = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": metadata,
        "spec": {"runPolicy": {"cleanPodPolicy": "None"}, "pytorchReplicaSpecs": replicas},
    }
    return yaml.dump_all([config_map, job], Dumper=_Dumper, sort_keys=False, width=120)


def _require_shared(plan: Plan, options: KubernetesOptions) -> None:
    if not options.volumes:
        raise ConfigError("--volume: none is given, and pods share nothing else; name one as CLAIM:/path")
    mounts = [PurePosixPath(path) for _, path in options.volumes]
    problems = []
    folders = {"run_dir": plan.config.folder, "data.path": plan.config.data.path, "init_from": plan.config.init_from}
    for key, folder in folders.items():
        if not folder:
            continue
        where = PurePosixPath(plan.workdir) / folder
        if ".." in where.parts or not any(where.is_relative_to(mount) for mount in mounts):
            problems.append(
                f"{key}: {where} is on none of the volumes ({', '.join(map(str, mounts))}), so it would be lost with "
                f"its pod; set {key} to a path there"
            )
    if problems:
        raise ConfigError(*problems)


def _replica(plan: Plan, options: KubernetesOptions, name: str, count: int, *, is_host: str) -> dict[str, Any]:
    volumes = [
        {"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}}
        for number, (claim, _) in enumerate(options.volumes)
    ]
    mounts = [{"name": f"volume-{number}", "mountPath": path} for number, (_, path) in enumerate(options.volumes)]
    container = {
        "name": "pytorch",  # the operator looks for this name
        "image": options.image,
        "command": ["bash", "-c", _pod_script(plan, f"{name}-master-0", name, is_host)],
        "workingDir": plan.workdir,
        "env": _environment(plan, options),
        "ports": [{"name": "pytorchjob-port", "containerPort": plan.port}],
        "volumeMounts": [
            *mounts,
            {"name": "config", "mountPath": _CONFIG_FOLDER},
            {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108  # NCCL and data workers
        ],
    } | ({"resources": {"limits": {"nvidia.com/gpu": plan.agents.ranks_per_node}}} if plan.has_gpus else {})
    return {
        "replicas": count,
        "restartPolicy": "ExitCode",
        "template": {
            "metadata": {"annotations": {"sidecar.istio.io/inject": "false"}},
            "spec": {
                "terminationGracePeriodSeconds": plan.agents.grace_s + 30,
                "containers": [container],
                "volumes": [
                    *volumes,
                    {"name": "config", "configMap": {"name": f"{name}-config"}},
                    {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
                ],
            },
        },
    }


def _pod_script(plan: Plan, endpoint: str, run_id: str, is_host: str) -> str:
    agent = plan.agent(run_id=run_id, endpoint=endpoint, is_host=is_host, local_addr='"$POD_IP"')
    return f"""\
set -u
interrupted=
trap 'interrupted=1; kill -TERM "$child"' TERM
{agent} &
child=$!
{WAIT_FOR_CHILD}
# The operator tries 128 and above again and takes anything below for final (restartPolicy: ExitCode).
# 75: asked to stop, and saved. 5: another pod was lost.
case $code in
    5 | 75) exit 138 ;;
    *) exit "$code" ;;
esac
"""


def _environment(plan: Plan, options: KubernetesOptions) -> list[dict[str, Any]]:
    plain = plan.environment(options.interface)
    plain.pop("PATH", None)  # of the image
    found: list[dict[str, Any]] = [{"name": key, "value": value} for key, value in plain.items()]
    found.append({"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}})
    if options.wandb_secret:
        key = {"name": options.wandb_secret, "key": "WANDB_API_KEY"}
        found.append({"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": key}})
    return found


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block, so that a person can read the script; and no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _block_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _block_text)
