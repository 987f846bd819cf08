"""Starting a job with nothing but ssh, on the hosts of a DeepSpeed hostfile (`host slots=N`, a line each)."""

import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launch._cluster_plan import WAIT_FOR_CHILD, Plan, exports
from launch.torchrun import cause
from trainer.errors import ConfigError, PeerLostError

_LINE = re.compile(r"(?P<host>[A-Za-z0-9_][A-Za-z0-9_.@-]*)\s+slots=(?P<slots>\d+)")
_SSH_FAILED = 255


@dataclass(frozen=True)
class Host:
    """A line of a hostfile."""

    name: str
    """As ssh takes it: `host` or `user@host`."""
    slots: int

    @property
    def address(self) -> str:
        """Without the user."""
        return self.name.rpartition("@")[2]


def read_hostfile(path: Path) -> list[Host]:
    """Hosts in their order; the first one holds the rendezvous. Raises ConfigError with every problem."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hostfile: {path} cannot be read ({error})") from error
    hosts: list[Host] = []
    problems = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _LINE.fullmatch(text)
        if found is None:
            problems.append(f"{path}:{number}: '{text}' is not of the form 'host slots=N'")
        elif int(found["slots"]) < 1:
            problems.append(f"{path}:{number}: {found['host']} has slots=0; give it ranks or remove the line")
        elif found["host"] in [host.name for host in hosts]:
            problems.append(f"{path}:{number}: {found['host']} is there twice; give all its slots in one line")
        else:
            hosts.append(Host(found["host"], int(found["slots"])))
    if not problems and not hosts:
        problems.append(f"{path}: names no host; write one 'host slots=N' a line")
    if not problems and len({host.slots for host in hosts}) > 1:
        told = ", ".join(f"{host.name} {host.slots}" for host in hosts)
        problems.append(f"{path}: every host needs the same number of slots, not {told}")
    if problems:
        raise ConfigError(*problems)
    return hosts


def commands(plan: Plan, hosts: Sequence[Host], interface: str) -> list[list[str]]:
    """One `ssh` command for each host, as words. On the far side the end of standard input means: save and stop."""
    return [["ssh", host.name, f"bash -c {shlex.quote(_remote(plan, hosts, host, interface))}"] for host in hosts]


def display(lines: Sequence[Sequence[str]], hosts: Sequence[Host]) -> str:
    """The commands as a person pastes them, each into a terminal of its own."""
    return "".join(f"# {host.name}\n{shlex.join(words)}\n\n" for host, words in zip(hosts, lines, strict=True))


def _remote(plan: Plan, hosts: Sequence[Host], host: Host, interface: str) -> str:
    agent = plan.agent(
        run_id=f"ssh-{plan.port}",
        endpoint=hosts[0].address,
        is_host="true" if host is hosts[0] else "false",
        local_addr=host.address,
    )
    # ssh passes no signal on. What it does pass on is that its own standard input, or the connection, is closed.
    return f"""\
cd {shlex.quote(plan.workdir)} || exit 6
{exports(plan.environment(interface))}exec 3<&0
{agent} </dev/null 3<&- &
child=$!
(
    while read -r -u 3; do :; done
    echo "standard input is closed: the ranks are asked to save and stop" >&2
    kill -TERM "$child"
) &
watch=$!
exec 3<&-
interrupted=
trap 'interrupted=1; kill -TERM "$child"' TERM HUP
{WAIT_FOR_CHILD}kill "$watch" 2>/dev/null
exit "$code"
"""


def run(plan: Plan, hosts: Sequence[Host], interface: str) -> int:
    """Start all hosts, show their output with the host before each line, and return the exit code of the job.

    SIGTERM, SIGINT or SIGUSR1 asks every host to save and stop; so does the first failure of one host. Raises
    PeerLostError if ssh itself fails.
    """
    running = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for words in commands(plan, hosts, interface)
    ]

    def stop(number: int = 0, frame: FrameType | None = None) -> None:
        for process in running:
            # The descriptor itself: closing a Python file inside a signal handler may meet its own lock.
            if process.stdin is not None and not process.stdin.closed:
                process.stdin.close()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    width = max(len(host.name) for host in hosts)
    codes: list[int] = [0] * len(hosts)

    def follow(index: int) -> None:
        process = running[index]
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(f"{hosts[index].name:>{width}}: {line}")
            sys.stdout.flush()
        codes[index] = process.wait()
        if codes[index]:
            stop()

    threads = [threading.Thread(target=follow, args=(index,)) for index in range(len(hosts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop()
    for number, handler in previous.items():
        signal.signal(number, handler)
    unreachable = [host.name for host, code in zip(hosts, codes, strict=True) if code == _SSH_FAILED]
    if unreachable:
        raise PeerLostError(f"ssh to {', '.join(unreachable)} failed (see above); is the host known, with a key?")
    # A host that was still waiting for the others when it was asked to stop ends by the signal: not the cause.
    own = [code for code in codes if 0 < code < 128]
    return cause(own or codes) if any(codes) else 0
