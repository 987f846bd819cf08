"""Two "nodes" on one machine: network namespaces joined by a pair of veth interfaces, with host names of their own.

What a node sends to the other leaves through its interface and arrives through the other's: a rendezvous or a
collective that only works on one host does not work here. They share the file system, as nodes of a cluster do.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faults.faultkit import Job
from tests.harness import environment

PORT = 29513  # free: nothing else listens in a new namespace
INTERFACE = "node0"
JOIN_TIMEOUT_S = 90


class NoNamespaces(Exception):
    """This machine does not let us make them; says why."""


@dataclass(frozen=True)
class Node:
    """A network namespace."""

    name: str
    """Host name that processes there see."""
    namespace: str
    address: str

    def words(self, *words: str) -> list[str]:
        """The command line that runs `words` on this node, in place of the process that is started."""
        on_node = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        return ["ip", "netns", "exec", self.namespace, *on_node, *words]


class Agent(Job):
    """One node's torchrun agent, with `ranks` ranks of a training."""

    def __init__(
        self, node: Node, config: Path, run_dir: Path, *overrides: str, nodes: "list[Node]", ranks: int = 1,
        max_restarts: int = 2, join_timeout: int = JOIN_TIMEOUT_S, fault: str = "",
    ) -> None:  # fmt: skip
        self._node = node
        is_host = str(node == nodes[0]).lower()
        line = node.words(
            sys.executable, "-m", "launch.torchrun", f"--nnodes={len(nodes)}", f"--nproc-per-node={ranks}",
            "--rdzv-backend=c10d", "--rdzv-id=test", f"--rdzv-endpoint={nodes[0].address}:{PORT}",
            # A node that is gone is given up after three seconds instead of fifteen.
            f"--rdzv-conf=is_host={is_host},join_timeout={join_timeout},keep_alive_interval=1",
            f"--local-addr={node.address}", f"--max-restarts={max_restarts}",
            "-m", "tests.faults.worker", str(config), f"run_dir={run_dir}", *overrides,
        )  # fmt: skip
        self._start(line, run_dir, environment(FAULT=fault, GLOO_SOCKET_IFNAME=INTERFACE))

    def left(self) -> list[str]:
        """Processes of this node alone."""
        found = subprocess.run(
            ["ip", "netns", "pids", self._node.namespace], capture_output=True, text=True, check=True
        )
        return found.stdout.split()


@contextmanager
def two_nodes() -> Iterator[list[Node]]:
    """Two nodes that reach each other and nothing else. Raises NoNamespaces."""
    nodes = [Node(f"node-{x}", f"evenkeel-{os.getpid()}-{x}", f"10.213.7.{n}") for n, x in ((1, "a"), (2, "b"))]
    first, second = nodes
    try:
        for node in nodes:
            _ip("netns", "add", node.namespace)
        peer = ["peer", "name", INTERFACE, "netns", second.namespace]
        _ip("link", "add", INTERFACE, "netns", first.namespace, "type", "veth", *peer)
        for node in nodes:
            _ip("-n", node.namespace, "addr", "add", f"{node.address}/24", "dev", INTERFACE)
            _ip("-n", node.namespace, "link", "set", INTERFACE, "up")
            _ip("-n", node.namespace, "link", "set", "lo", "up")
        done = subprocess.run(first.words("true"), capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoNamespaces(done.stderr.strip())
        yield nodes
    finally:
        for node in nodes:
            subprocess.run(["ip", "netns", "delete", node.namespace], capture_output=True, check=False)


def _ip(*words: str) -> None:
    try:
        subprocess.run(["ip", *words], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise NoNamespaces("there is no `ip` command") from None
    except subprocess.CalledProcessError as error:
        raise NoNamespaces(error.stderr.strip()) from None
