"""What tests of several commands share."""

import os
from pathlib import Path

import pytest

STAND_INS = {
    # One process for each node; the exit code is the highest of theirs, as srun's is.
    "srun": """\
while [[ $1 == --* ]]; do shift; done
pids=()
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node SLURMD_NODENAME=127.0.0.1 "$@" &
    pids+=($!)
done
echo "${pids[@]}" > "$STAND_IN/pids"
code=0
for pid in "${pids[@]}"; do wait "$pid" || { this=$?; (( this > code )) && code=$this; }; done
exit "$code"
""",
    "scontrol": """\
case $1 in
    show) for ((node = 0; node < SLURM_NNODES; node++)); do echo 127.0.0.1; done ;;
    *) echo "$@" >> "$STAND_IN/scontrol" ;;
esac
""",
    "scancel": 'echo "$@" >> "$STAND_IN/scancel"; kill -TERM $(cat "$STAND_IN/pids")\n',
    "ssh": 'echo "$1" >> "$STAND_IN/ssh"; [[ $1 == unreachable ]] && exit 255; exec bash -c "$2"\n',
}


@pytest.fixture
def on_path(tmp_path: Path) -> dict[str, str]:
    """An environment in which a cluster's commands are stand-ins of a few lines."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}")
        (folder / name).chmod(0o755)
    return {
        "STAND_IN": str(tmp_path), "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
