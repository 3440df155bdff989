"""What `gaussian_dual_kl` is measured on: sizes, dtypes and modes, and how many bytes each needs to move.

All modes, each of them on

- the ladder of batch sizes with the paper's 8 slots of 512 dimensions, in float32;
- d = 64 and d = 2048 in float32, and d = 512 in bfloat16, at the three batch sizes of `MIDDLE`.

That is where the full cross product is cut, and the only place: all of it would take a small CPU hours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# forward: with a graph to differentiate. no-grad: without one. backward: alone. full: forward, then backward.
MODES = ("forward", "backward", "full", "no-grad")

# Elements an ideal implementation moves per latent element. Forward reads four tensors and writes z; backward reads the
# four and the gradient of z, and writes four gradients. The KLs, one number a row, are left out: 0.1% at d = 512.
ELEMENTS_MOVED = {"forward": 4 + 1, "no-grad": 4 + 1, "backward": (4 + 1) + 4, "full": (4 + 1) + (4 + 1) + 4}

SLOTS = 8
LADDER = (1, 4, 16, 64, 256, 1024, 4096)  # one example; what a device trains on; and enough to fill any GPU
MIDDLE = (16, 256, 1024)

# Leaves rotate until together they exceed this, twice the last-level cache of large processors and GPUs: then no call
# finds its inputs in a cache. Small ones still do, as in training, where what made them has just run.
ROTATED_BYTES = 128 * 2**20
MAX_SETS = 16


@dataclass(frozen=True)
class Case:
    """One shape, dtype and mode. All providers of a case are measured together."""

    batch: int
    d: int
    dtype: torch.dtype
    mode: str
    slots: int = SLOTS

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch, self.slots, self.d

    @property
    def elements(self) -> int:
        return self.batch * self.slots * self.d

    @property
    def bytes_moved(self) -> int:
        """Of an ideal implementation, and so the same for every provider: GB/s rank them as their times do."""
        return ELEMENTS_MOVED[self.mode] * self.elements * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        return f"gaussian_dual_kl {self.batch}x{self.slots}x{self.d} {self.dtype_name} {self.mode}"


def cases(*, quick: bool = False) -> list[Case]:
    """The cases in the order in which they are measured; a few small ones if `quick`."""
    if quick:
        return [Case(batch, 64, torch.float32, mode) for batch in (1, 64) for mode in ("full", "no-grad")]
    kinds = [
        (512, torch.float32, LADDER),
        (64, torch.float32, MIDDLE),
        (2048, torch.float32, MIDDLE),
        (512, torch.bfloat16, MIDDLE),
    ]
    return [Case(batch, d, dtype, mode) for d, dtype, batches in kinds for batch in batches for mode in MODES]


def overhead_case(mode: str) -> Case:
    """Where hardly anything is computed, a call costs what reaching the computation costs."""
    return Case(1, 64, torch.float32, mode)


class Inputs(NamedTuple):
    """Leaves (mean_q, logvar_q, mean_p, logvar_p), and the gradients of (z, forward_kl, reverse_kl)."""

    leaves: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...]


def make_inputs(case: Case, device: torch.device, *, seed: int = 0) -> Inputs:
    """Posterior and prior in general position, where every provider's formula is accurate."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return torch.randn(case.shape, generator=generator, device=device).mul_(scale).to(case.dtype).requires_grad_()

    # Signs rather than normals: a narrow z is known to its own rounding, which large gradients would amplify.
    signs = torch.randn(case.shape, generator=generator, device=device).sign_().to(case.dtype)
    rows = [torch.rand(case.shape[:-1], generator=generator, device=device) + 0.5 for _ in range(2)]
    return Inputs((normal(1.0), normal(0.5), normal(1.0), normal(0.5)), (signs, *rows))


def make_rotation(case: Case, device: torch.device) -> list[Inputs]:
    """As many sets of inputs as `ROTATED_BYTES` asks for, at least two and at most `MAX_SETS`."""
    bytes_each = 4 * case.elements * case.dtype.itemsize
    sets = min(max(2, -(-ROTATED_BYTES // bytes_each)), MAX_SETS)
    return [make_inputs(case, device, seed=seed) for seed in range(sets)]
