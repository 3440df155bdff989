"""`gaussian_noise`: the standard normals that the latent ops use, on their own."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amvl_fast.errors import AMVLError
from amvl_fast.ops.arguments import check_sample_ids, check_stream, seed_tensor
from amvl_fast.ops.backends import choose_backend, kernels_of
from amvl_fast.ops.boundary import boundary, no_transforms
from amvl_fast.ops.philox import philox_normal


def _empty(shape: Sequence[int], seed: Tensor, *_: Any) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=seed.device)


@boundary(
    "gaussian_noise(SymInt[] shape, Tensor seed, Tensor? sample_ids, int stream, str backend) -> Tensor", fake=_empty
)
def _noise(shape: Sequence[int], seed: Tensor, sample_ids: Tensor | None, stream: int, backend: str) -> Tensor:
    out = _empty(shape, seed)
    kernels_of(backend).gaussian_noise(out, seed, sample_ids, stream)
    return out


def gaussian_noise(
    shape: Sequence[int],
    seed: int | Tensor | None,
    *,
    device: torch.device | str = "cpu",
    backend: str | None = None,
    stream: int = 0,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """Standard normals that depend on (seed, stream, row, column) alone.

    The row is the flattened leading index, unless `sample_ids` say otherwise, and the column the index in the
    last dimension, so a normal stays the same whatever else is in the tensor, on every device and backend (to
    float32 rounding). Defined in `amvl_fast.ops.philox`: Philox 4x32-10 and Box-Muller.

    Args:
        shape: `[..., d]`, at least one dimension.
        seed: an int, a one-element int64 tensor on `device`, or None for one from PyTorch's generator.
        device: where to make the noise.
        backend: `"triton"`, `"cpu"`, `"torch"`, or None to choose by device.
        stream: number of an independent sequence for the same seed, 0 to 2**32 - 1. `gaussian_dual_kl`
            uses 0.
        sample_ids: int64 `[n]` on `device`, a number for each index of the leading dimension, of a shape
            `[n, ..., d]`; or None for 0 to n - 1. A sample's noise follows its number instead of its place, so
            that in training it stays the same however a batch is sorted or split over micro-batches and
            processes. With m rows in a sample, row r is row `sample_ids[r // m] * m + r % m` of the noise,
            modulo 2**64.

    Returns:
        A float32 tensor of the given shape.

    Raises:
        AMVLError: (a ValueError) for a shape that is no sequence of ints, without dimensions or with a negative one,
            bad sample ids, a bad seed or stream, or a device or backend that cannot run here.

    Example:
        >>> noise = gaussian_noise((2, 3, 8), seed=0)
        >>> bool((gaussian_noise((6, 5), seed=0) == noise.reshape(6, 8)[:, :5]).all())
        True
    """
    op = "gaussian_noise"
    try:
        # The index of a symbolic size would be the number itself, and every length be compiled anew.
        shape = tuple(size if isinstance(size, (int, torch.SymInt)) else operator.index(size) for size in shape)
    except TypeError:
        raise AMVLError(f"{op}: shape is {shape!r}; pass a sequence of ints.") from None
    if not shape or min(shape) < 0:
        raise AMVLError(f"{op}: shape is {list(shape)}; pass at least one dimension and no negative size.")
    try:
        # An empty tensor resolves "cuda" to the current device, index included.
        device = torch.empty(0, device=device).device
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise AMVLError(f"{op}: device is {device!r} ({reason}); pass one that is here, such as 'cpu'.") from None
    stream = check_stream(op, stream)
    name = choose_backend(backend, [], device)
    if name != "torch":
        no_transforms(op)
    sample_ids = check_sample_ids(op, sample_ids, shape, device)
    seed = seed_tensor(op, seed, device)
    if name == "torch":
        return philox_normal(shape, seed, stream=stream, sample_ids=sample_ids)
    return _noise(shape, seed, sample_ids, stream, name)
