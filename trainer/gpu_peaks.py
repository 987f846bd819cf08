"""What an accelerator can do at most, for MFU: dense figures without sparsity from the makers' data sheets.

bf16 by tensor cores with fp32 accumulation, and fp32 outside tensor cores (we leave TF32 off). First match by name
wins, so a variant stands before its family.
"""

import logging
import re
from typing import NamedTuple

import torch

log = logging.getLogger("evenkeel")


class Peak(NamedTuple):
    """FLOP/s of one device as torch sees it."""

    name: str
    bf16: float
    fp32: float
    source: str


PEAKS = (
    Peak("GB200", 2500e12, 80e12, "NVIDIA GB200 NVL72 data sheet, a GPU"),
    Peak("B200", 2250e12, 75e12, "NVIDIA HGX B200 data sheet / 8"),
    Peak("GH200", 989.4e12, 66.9e12, "NVIDIA GH200 data sheet"),
    Peak("H200 NVL", 835e12, 60e12, "NVIDIA H200 data sheet, NVL"),
    Peak("H200", 989.4e12, 66.9e12, "NVIDIA H200 data sheet, SXM"),
    Peak("H100 NVL", 835e12, 60e12, "NVIDIA H100 data sheet, NVL"),
    Peak("H100 PCIe", 756e12, 51.2e12, "NVIDIA H100 architecture white paper, PCIe"),
    Peak("H100", 989.4e12, 66.9e12, "NVIDIA H100 architecture white paper, SXM5"),
    Peak("H800", 989.4e12, 66.9e12, "as H100 SXM5, with fewer links"),
    Peak("H20", 148e12, 44e12, "NVIDIA H20 data sheet"),
    Peak("A100", 312e12, 19.5e12, "NVIDIA A100 data sheet"),
    Peak("A800", 312e12, 19.5e12, "as A100, with fewer links"),
    Peak("L40S", 362e12, 91.6e12, "NVIDIA L40S data sheet"),
    Peak("L4", 121e12, 30.3e12, "NVIDIA L4 data sheet"),
    Peak("A10", 125e12, 31.2e12, "NVIDIA A10 data sheet"),
    Peak("MI300X", 1307.4e12, 163.4e12, "AMD Instinct MI300X data sheet"),
    Peak("MI325X", 1307.4e12, 163.4e12, "AMD Instinct MI325X data sheet"),
)


def find_peak(device_name: str) -> Peak | None:
    """The entry for a device by the name torch gives it, or None."""
    return next((peak for peak in PEAKS if re.search(rf"\b{peak.name}\b", device_name)), None)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak of one accelerator in `precision` (bf16 or fp32); None where it is not known, and there is no `mfu` then."""
    if device.type != "cuda":
        log.debug("no mfu: there is no accelerator")
        return None
    name = torch.cuda.get_device_name(device)
    peak = find_peak(name)
    if peak is None:
        log.info("no mfu: the peak of '%s' is not in trainer/gpu_peaks.py", name)
        return None
    return peak.fp32 if precision == "fp32" else peak.bf16
