"""The C++ part of the CPU experts: built once by `python -m launch.warmup`, used where it is found.

Training never compiles: it loads the library that the set-up has built for this source, torch and processor, or says in
the log that there is none and runs the same loop in plain torch, which differs by rounding.
"""

import functools
import hashlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger("evenkeel")

_SOURCE = Path(__file__).with_name("cpu_experts.cpp")

# What torch's own kernels are compiled with, for each level that it reports of a processor.
_CAPABILITY_FLAGS = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"],
    "AVX512": [
        "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c",
        "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512",
    ],
}  # fmt: skip


def library_path() -> Path:
    """Where the library for this source, torch and processor is or would be."""
    from torch.utils.cpp_extension import get_default_build_root

    key = f"{_SOURCE.read_text()}{torch.__version__}{torch.backends.cpu.get_cpu_capability()}"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    return Path(root) / f"evenkeel_cpu_experts_{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"


@functools.cache
def available() -> bool:
    """Whether `torch.ops.evenkeel` can be used. Loads the library at the first call; a missing one is logged once."""
    if not hasattr(torch.ops.evenkeel, "experts_forward"):  # else this process has just built it
        path = library_path()
        try:
            torch.ops.load_library(path)
        except OSError as error:
            reason = str(error).splitlines()[0] if path.exists() else "not built: run python -m launch.warmup"
            log.warning("the CPU experts run in plain torch, a little slower, without their C++ part (%s)", reason)
            return False
    _count_flops()
    return True


def _count_flops() -> None:
    """Tell torch's FLOP counter what it cannot see: two matrix products an expert forward, four backward."""
    from torch.utils.flop_counter import register_flop_formula

    def forward(x: Any, gates: Any, gate_up: Any, down: Any, token_of_row: Any, *rest: Any, out_shape: Any) -> int:
        intermediate, width = down[1:]
        return 2 * token_of_row[0] * width * (2 * intermediate + intermediate)

    def backward(dy: Any, *shapes: Any, out_shape: Any) -> int:
        return 2 * forward(*shapes, out_shape=out_shape)

    register_flop_formula(torch.ops.evenkeel.experts_forward)(forward)
    register_flop_formula(torch.ops.evenkeel.experts_backward)(backward)


def build() -> None:
    """Compile the library to where `available` looks, unless it is there; RuntimeError or OSError if that fails."""
    from torch.utils.cpp_extension import load

    path = library_path()
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Aside and then moved: an interrupted build leaves nothing that could be taken for a library.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        load(
            path.stem,
            [str(_SOURCE)],
            # OpenMP in the compiler only: the symbols are those of the runtime that torch has loaded, not of a second.
            extra_cflags=["-O3", "-fopenmp", *_CAPABILITY_FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])],
            build_directory=folder,
            with_cuda=False,
            is_python_module=False,
        )
        os.replace(Path(folder) / path.name, path)
