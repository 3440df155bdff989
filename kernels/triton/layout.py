"""How tensors of any strides become rows, and rows become blocks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """Tensors of one shape `[..., d]` seen as `[rows // inner, inner, d]`.

    Attributes:
        tensors: the inputs, as they were but for the rare one that had to be copied.
        strides: for each tensor its strides (outer, inner, column).
        rows: the number of rows.
        inner: how many rows the inner dimension holds.
    """

    tensors: list[Tensor | None]
    strides: list[tuple[int, int, int]]
    rows: int
    inner: int


def as_rows(shape: Sequence[int], tensors: Sequence[Tensor | None]) -> Rows:
    """Fold the leading dimensions of all tensors into at most two, without copies.

    Two dimensions fold into one where every tensor steps through them evenly. Halves of a chunked tensor
    leave one dimension, an expanded prior or a transposed input two. More than two is left only by exotic
    mixtures of views; then, and only then, the tensors are copied. A None among the tensors stays None.
    """
    folded = _fold(shape, tensors)
    if len(folded) > 2:
        tensors = [None if tensor is None else tensor.contiguous() for tensor in tensors]
        folded = _fold(shape, tensors)
    while len(folded) < 2:
        folded.insert(0, (1, [0] * len(tensors)))
    (_, outer_strides), (inner, inner_strides) = folded
    strides = [
        (outer, inner_stride, 0 if tensor is None else tensor.stride(-1))
        for tensor, outer, inner_stride in zip(tensors, outer_strides, inner_strides, strict=True)
    ]
    return Rows(list(tensors), strides, math.prod(shape[:-1]), inner)


def _fold(shape: Sequence[int], tensors: Sequence[Tensor | None]) -> list[tuple[int, list[int]]]:
    """The leading dimensions as (size, strides of the tensors), folded where all tensors allow it."""
    folded: list[tuple[int, list[int]]] = []
    for dim, size in enumerate(shape[:-1]):
        strides = [0 if tensor is None else tensor.stride(dim) for tensor in tensors]
        if size == 1:
            continue
        if folded and all(outer == size * inner for outer, inner in zip(folded[-1][1], strides, strict=True)):
            folded[-1] = (folded[-1][0] * size, strides)
        else:
            folded.append((size, strides))
    return folded


class Block(NamedTuple):
    """The shape of one program's block and how many warps share it."""

    rows: int
    columns: int
    warps: int


def block_for(columns: int) -> Block:
    """The static rule for block sizes.

    1,024 elements for 4 warps are 8 a thread: two Philox counters, and 16-byte loads in every dtype. Rows
    wider than that are walked in steps; narrow ones share a block. The rule looks at the width alone, never
    at the number of rows, so a row's sum is made in the same order wherever the row stands.
    """
    width = min(max(triton.next_power_of_2(columns), 16), 1024)
    return Block(rows=1024 // width, columns=width, warps=4)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, so make the tensor's device current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@triton.jit
def row_offset(row, inner, strides):
    """Where int64 rows begin in a tensor of the given (outer, inner, column) strides."""
    return (row // inner) * strides[0] + (row % inner) * strides[1]


@triton.jit
def load(pointer, offset, column, strides, mask):
    """A `[rows, columns]` block in float32. The cast comes first: nothing is computed in a narrower dtype."""
    where = pointer + offset[:, None] + column.to(tl.int64)[None, :] * strides[2]
    return tl.load(where, mask=mask, other=0.0).to(tl.float32)
