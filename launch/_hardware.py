"""GPUs and networks a run can be foretold for, by their makers' figures. Bandwidths are bytes/s in one direction."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One accelerator, as its data sheet has it."""

    name: str
    peak_flops: float  # bf16 on tensor cores, without sparsity
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float  # to the GPUs of its node


@dataclass(frozen=True)
class Network:
    """What one GPU has to reach other nodes."""

    name: str
    bandwidth: float
    latency: float  # of one message, seconds


# H100 SXM5: NVIDIA H100 data sheet (989 TFLOP/s bf16 dense, 80 GB, 3.35 TB/s, NVLink 900 GB/s both ways together).
# H200 SXM: NVIDIA H200 data sheet (the same cores, 141 GB, 4.8 TB/s).
# B200: NVIDIA DGX B200 and HGX B200 data sheets (2.25 PFLOP/s bf16 dense, 180 GB, 8 TB/s, NVLink 1.8 TB/s both ways).
GPUS = {
    "h100": Gpu("h100", 989e12, 80e9, 3.35e12, 450e9),
    "h200": Gpu("h200", 989e12, 141e9, 4.8e12, 450e9),
    "b200": Gpu("b200", 2250e12, 180e9, 8.0e12, 900e9),
}

# One port for each GPU. ConnectX-7 NDR InfiniBand is 400 Gb/s, ConnectX-8 XDR 800, HDR 200 (NVIDIA data sheets); RoCE
# is the same ports over Ethernet. Latencies are a few microseconds of a message plus its launch: our assumption.
NETWORKS = {
    "ib800": Network("ib800", 100e9, 10e-6),
    "ib400": Network("ib400", 50e9, 10e-6),
    "ib200": Network("ib200", 25e9, 10e-6),
    "roce400": Network("roce400", 50e9, 20e-6),
    "ethernet100": Network("ethernet100", 12.5e9, 30e-6),
}
