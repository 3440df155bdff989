"""GPUs that predictions are made for, with their published figures."""

from __future__ import annotations

import re
from dataclasses import dataclass

from amvl_fast.errors import AMVLError


@dataclass(frozen=True)
class GPU:
    """Published figures, of NVIDIA's data sheets for the GPU and for the DGX system that holds eight of them.

    Attributes:
        target: whose machine code it runs.
        bandwidth: of the memory, in bytes a second.
        processors: number of streaming multiprocessors.
        clock: boost clock in Hz.
        float_lanes: float32 results that one multiprocessor gives a clock; of integers all four give 64, of
            special functions 16.
        matrix_flops: dense bfloat16 operations a second on tensor cores.
        memory: bytes.
        link: of NVLink, bytes a second out of one GPU.
        network: bytes a second out of one node of `NODE` GPUs.
    """

    target: str
    bandwidth: float
    processors: int
    clock: float
    float_lanes: int
    matrix_flops: float
    memory: float
    link: float
    network: float


# GPUs of one node.
NODE = 8

GPUS = {
    "A100 80GB SXM": GPU("sm_80", 2039e9, 108, 1.41e9, 64, 312e12, 80e9, 300e9, 8 * 25e9),
    "H100 SXM": GPU("sm_90", 3350e9, 132, 1.98e9, 128, 989e12, 80e9, 450e9, 8 * 50e9),
    "H200 SXM": GPU("sm_90", 4800e9, 132, 1.98e9, 128, 989e12, 141e9, 450e9, 8 * 50e9),
    "B200": GPU("sm_100", 8000e9, 148, 1.965e9, 128, 2250e12, 192e9, 900e9, 8 * 50e9),
}


def find_gpu(name: str) -> str:
    """The key of `GPUS` that a name such as ``"h100"`` or ``"NVIDIA H100 80GB HBM3"`` means.

    Raises:
        AMVLError: none has that name.
    """
    words = re.split(r"[^a-z0-9]+", name.lower())
    for known in GPUS:
        # By its model number alone. PCIe cards and MIG slices of the same number are slower.
        if known.split()[0].lower() in words and not {"pcie", "nvl", "mig"} & set(words):
            return known
    raise AMVLError(f"The GPU {name!r} is not known; use one of: {', '.join(GPUS)}.")


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 operations a second of what ``torch.cuda.get_device_name()`` names; None if not in the table."""
    try:
        return GPUS[find_gpu(device_name)].matrix_flops
    except AMVLError:
        return None
