#!/usr/bin/env bash
# On a machine with a CUDA GPU: the device tests, then a short bf16 training of the quickstart through DeepSpeed over NCCL,
# with tokens/s, MFU and host syncs a step. What it needs and where it looks for it: gpu_env.sh.
set -euo pipefail
. "$(dirname "$0")/gpu_env.sh"

"$PYTHON" -m pytest -m gpu
"$PYTHON" -m launch.prepare configs/quickstart.yaml
"$PYTHON" -m launch.torchrun --standalone --nproc_per_node=1 -m tests.gpu.measure configs/quickstart.yaml
