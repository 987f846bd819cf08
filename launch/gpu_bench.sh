#!/usr/bin/env bash
# On a machine with a CUDA GPU: the benches of tests/bench/gpu, in under eight minutes and without network. Arguments are
# the bench's own. What it needs and where it looks for it: gpu_env.sh.
#
# Peers that are no dependency take part where they can be imported, and are listed as not run where not:
#   pip download --no-deps -d wheels liger-kernel cut-cross-entropy sonic-moe quack-kernels torchtitan
# and, on the machine: .venv-gpu/bin/pip install --no-index --no-deps --find-links wheels <what there is>
set -euo pipefail
. "$(dirname "$0")/gpu_env.sh"

exec "$PYTHON" -m tests.bench.gpu "$@"
