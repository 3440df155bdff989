"""GPUs that predictions are made for, with their published figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """Published figures.

    Attributes:
        target: whose machine code it runs.
        bandwidth: of the memory, in bytes a second.
        processors: number of streaming multiprocessors.
        clock: boost clock in Hz.
        float_lanes: float32 results that one multiprocessor gives a clock; of integers all four give 64, of
            special functions 16.
        matrix_flops: dense bfloat16 operations a second on tensor cores.
    """

    target: str
    bandwidth: float
    processors: int
    clock: float
    float_lanes: int
    matrix_flops: float


GPUS = {
    "A100 80GB SXM": GPU("sm_80", 2039e9, 108, 1.41e9, 64, 312e12),
    "H100 SXM": GPU("sm_90", 3350e9, 132, 1.98e9, 128, 989e12),
    "H200 SXM": GPU("sm_90", 4800e9, 132, 1.98e9, 128, 989e12),
    "B200": GPU("sm_100", 8000e9, 148, 1.965e9, 128, 2250e12),
}
