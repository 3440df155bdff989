"""What a training step costs: operations, memory and time, from a model's configuration alone."""

from __future__ import annotations

from amvl_fast.cost.flops import Flops, Recipe, Sample, step_flops, training_flops
from amvl_fast.cost.gpus import GPUS, find_gpu, peak_flops
from amvl_fast.cost.sizes import Sizes, read_sizes, sizes_of

__all__ = [
    "GPUS",
    "Flops",
    "Recipe",
    "Sample",
    "Sizes",
    "find_gpu",
    "peak_flops",
    "read_sizes",
    "sizes_of",
    "step_flops",
    "training_flops",
]
