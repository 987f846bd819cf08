# shellcheck shell=bash
# Sourced by the scripts for a machine with a CUDA GPU: go to the repository, find or make a Python that has what they
# need, and put it into PYTHON and first into PATH. Ends with exit code 2 where there is no GPU.
#
# Uses the Python that has torch (set PYTHON to choose). What else is missing is installed into .venv-gpu from the folder
# wheels/, without network; fill it on a connected machine with the same Python:
#   pip download -d wheels -c constraints.txt deepspeed megatron-core datasets omegaconf wandb rich safetensors \
#     tokenizers ninja transformers pytest pytest-timeout hypothesis setuptools
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}

if ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "error: $PYTHON sees no CUDA GPU; run this where there is one, or set PYTHON to an interpreter whose torch has CUDA" >&2
  exit 2
fi
if ! "$PYTHON" -c 'import deepspeed, megatron.core, datasets, omegaconf, wandb, trainer.registry as r, sys; sys.exit(not r.hook_names())' 2>/dev/null; then
  "$PYTHON" -m venv --system-site-packages .venv-gpu
  PYTHON=$PWD/.venv-gpu/bin/python
  if [ -d wheels ]; then
    # No -c constraints here: torch is the machine's own, and its version may differ from the pinned one.
    "$PYTHON" -m pip install --quiet --no-index --find-links wheels deepspeed megatron-core datasets omegaconf wandb \
      rich safetensors tokenizers ninja transformers pytest pytest-timeout hypothesis setuptools
  fi
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-build-isolation -e .
fi
PATH="$(dirname "$PYTHON"):$PATH"
export PATH
