"""What the ops check and complete before any backend sees a tensor: shapes, dtypes, devices, seeds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amvl_fast.errors import AMVLError

_MAX_STREAM = 2**32
_SEEDS = 2**63 - 1


def broadcast_inputs(op: str, **inputs: Tensor) -> tuple[Tensor, ...]:
    """The op's inputs as views of one shape `[..., d]`.

    Raises:
        AMVLError: if an input is no tensor, not floating or 0-dimensional, or if devices or shapes disagree.
    """
    for name, tensor in inputs.items():
        if not isinstance(tensor, Tensor):
            raise AMVLError(f"{op}: {name} is a {type(tensor).__name__}; pass a floating-point torch.Tensor.")
        if not tensor.is_floating_point():
            raise AMVLError(f"{op}: {name} is {tensor.dtype}; pass a floating-point tensor such as float32.")
        if tensor.dim() == 0:
            raise AMVLError(f"{op}: {name} is 0-dimensional; pass [..., d], with the latent dimension last.")
    if len({tensor.device for tensor in inputs.values()}) > 1:
        devices = ", ".join(f"{name} on {tensor.device}" for name, tensor in inputs.items())
        raise AMVLError(f"{op}: the inputs are on different devices ({devices}); move them to one.")
    try:
        return torch.broadcast_tensors(*inputs.values())
    except RuntimeError:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
        raise AMVLError(f"{op}: the shapes do not broadcast ({shapes}); make them equal or expandable.") from None


def seed_tensor(op: str, seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as a one-element int64 tensor on `device`, made without waiting for the device.

    None draws from PyTorch's own generator of that device, so that `torch.manual_seed`, the replay of a
    checkpointed activation and of a CUDA graph all do what they do for `torch.randn`.

    Raises:
        AMVLError: if the seed is neither None, nor an int of 64 bits, nor such a tensor on `device`.
    """
    if seed is None:
        return torch.randint(_SEEDS, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise AMVLError(
                f"{op}: seed is a {seed.dtype} tensor of shape {list(seed.shape)}; pass an int or a "
                "one-element int64 tensor."
            )
        if seed.device != device:
            raise AMVLError(f"{op}: seed is on {seed.device} and the op runs on {device}; move the seed there.")
        return seed.detach().reshape(1)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise AMVLError(f"{op}: seed is {seed!r}; pass an int, a one-element int64 tensor or None.")
    if not -(2**63) <= seed < 2**63:
        raise AMVLError(f"{op}: seed {seed} does not fit 64 bits; pass one from -2**63 to 2**63 - 1.")
    # torch.tensor(seed, device=...) would copy from the host and wait; a fill does not.
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def check_sample_ids(op: str, sample_ids: Tensor | None, shape: Sequence[int], device: torch.device) -> Tensor | None:
    """The samples' numbers, contiguous, for an op over tensors of this shape; their values are not looked at.

    Raises:
        AMVLError: if they are neither None nor an int64 tensor `[shape[0]]` on `device`.
    """
    if sample_ids is None:
        return None
    if not isinstance(sample_ids, Tensor):
        raise AMVLError(f"{op}: sample_ids is a {type(sample_ids).__name__}; pass an int64 torch.Tensor or None.")
    if sample_ids.dtype != torch.int64:
        raise AMVLError(f"{op}: sample_ids is {sample_ids.dtype}; pass an int64 tensor.")
    if len(shape) < 2:
        raise AMVLError(f"{op}: sample_ids number a leading dimension, and shape {list(shape)} has none; pass [n, d].")
    if sample_ids.shape != tuple(shape[:1]):
        raise AMVLError(
            f"{op}: sample_ids has shape {list(sample_ids.shape)} and the op runs on {list(shape)}; pass one number "
            "for each index of the leading dimension."
        )
    if sample_ids.device != device:
        raise AMVLError(
            f"{op}: sample_ids is on {sample_ids.device} and the op runs on {device}; move the numbers there."
        )
    return sample_ids.contiguous()


def check_stream(op: str, stream: int) -> int:
    """The stream number, or AMVLError if it is not an int in [0, 2**32)."""
    if isinstance(stream, bool) or not isinstance(stream, int) or not 0 <= stream < _MAX_STREAM:
        raise AMVLError(f"{op}: stream is {stream!r}; pass an int from 0 to 2**32 - 1.")
    return stream
