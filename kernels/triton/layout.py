"""How tensors of any strides become rows, rows become blocks, and blocks become launches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# CUDA's limit for all axes of a grid but the first.
_MAX_PIECES = 65535

# For tests: 1 or 2 makes every launch at least as wide as `width_of` describes.
FORCED_WIDTH = 0


class Rows(NamedTuple):
    """How to find the rows of tensors of one shape `[..., d]`.

    Attributes:
        strides: for each tensor those of the leading dimensions, outermost first, and that of the columns.
        rows: the number of rows.
        inner: the sizes of all leading dimensions but the outermost.
    """

    strides: list[tuple[int, ...]]
    rows: int
    inner: tuple[int, ...]


def as_rows(shape: Sequence[int], tensors: Sequence[Tensor | None]) -> Rows:
    """Fold the leading dimensions of all tensors into as few as possible; none is ever copied.

    Two dimensions fold into one where every tensor steps through them evenly. Halves of a chunked tensor
    leave one dimension, an expanded prior or transposed rows two. None stands for a tensor that is not there.
    """
    folded: list[tuple[int, list[int]]] = []
    for dim, size in enumerate(shape[:-1]):
        strides = [0 if tensor is None else tensor.stride(dim) for tensor in tensors]
        if size == 1:
            continue
        if folded and all(outer == size * inner for outer, inner in zip(folded[-1][1], strides, strict=True)):
            folded[-1] = (folded[-1][0] * size, strides)
        else:
            folded.append((size, strides))
    folded = folded or [(1, [0] * len(tensors))]
    # PyTorch gives a dimension of size 1 any stride; as 1 it does not look like columns far apart.
    columns = [1 if tensor is None or shape[-1] == 1 else tensor.stride(-1) for tensor in tensors]
    strides_of = list(zip(*(strides for _, strides in folded), columns, strict=True))
    return Rows(strides_of, math.prod(shape[:-1]), tuple(size for size, _ in folded[1:]))


def as_odd(numbers: Sequence[int]) -> tuple[int, ...]:
    """Numbers that are not negative as odd ones above 1; `blocks.from_odd` takes it back.

    Triton compiles anew for a number in a tuple that is 1 or a multiple of 16, do_not_specialize or not; 0 and 1
    become 3 and 5. What loads may assume of a row is ALIGN's to say, so that a row alone has the layout, and with
    it the order of sums, that it has among others.
    """
    return tuple(2 * number + 3 for number in numbers)


class Block(NamedTuple):
    """The shape of one program's block, the columns of one thread, and how many warps share the block."""

    rows: int
    columns: int
    per_thread: int
    warps: int


def block_for(columns: int, itemsize: int, vector: int) -> Block:
    """The static rule for blocks, made for 64 registers a thread on sm_90: half of the warps then fit.

    A thread takes 16 bytes of each tensor, the most that one instruction moves: 4 columns in float32, 8 in
    the narrow types, whole Philox counters either way. More would cost registers, and with them the threads
    that hide the latency of memory. So would 8 columns where they cannot be read at once from every tensor:
    there a thread takes 4 in every dtype.

    A program has at least 4 warps, so that few wide rows still occupy the GPU, and one for each 128 columns
    of its row up to 8; narrow rows share a warp.

    A row of more than 1024 columns, or that would pad a power of two badly, is cut into pieces: of those that
    pad it least the widest. Where rows are summed one program walks them all, elsewhere each has its own. One
    row a program then, for pointers into several would be several times as many; and at least 2 warps, for
    with 1 the programs that fit on a multiprocessor, at most 32, would leave half of it empty.

    The number of rows has no say, so a row's sum is made in the same order whatever it is launched with.

    Args:
        columns: the width of a row.
        itemsize: of the widest element among the tensors.
        vector: how many columns side by side can be read at once from each tensor.
    """
    per_thread = 8 if itemsize == 2 and vector == 8 else 4
    padded = triton.next_power_of_2(columns)
    if padded > 1024 or (per_thread == 4 and padded > 512 and 4 * columns < 3 * padded):
        pieces = [piece for piece in (256, 512, 1024) if piece >= 64 * per_thread]
        piece = min(pieces, key=lambda piece: (-columns % piece, -piece))
        return Block(1, piece, per_thread, piece // (32 * per_thread))
    width = max(padded, per_thread)
    warps = min(max(padded // 128, 4), 8)
    return Block(warps * 32 * per_thread // width, width, per_thread, warps)


def alignment(tensor: Tensor) -> int:
    """The bytes, up to 16, of which every row of a tensor begins at a multiple; 0 where columns lie apart.

    A tensor's single row counts as one of many: it must not look better aligned than its neighbours, and be
    summed in another order than among them. So does a row to which PyTorch gave the stride of no neighbour.
    """
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return 0
    steps = (*tensor.stride()[:-1], tensor.shape[-1])
    return math.gcd(16, tensor.data_ptr(), *(step * tensor.element_size() for step in steps))


def width_of(rows: Rows, columns: int) -> int:
    """Where indices need 64 bits: 0 nowhere, 1 in offsets into tensors, 2 in the number of a row, too.

    The margin below 2**31 is for the rows and columns that a block has too many: they are masked, and must
    not wrap around to pass for others.
    """
    limit = 2**31 - 2**16
    if rows.rows >= limit:
        return 2
    sizes = (rows.rows // math.prod(rows.inner), *rows.inner, columns)
    spans = [sum((size - 1) * step for size, step in zip(sizes, s, strict=True)) for s in rows.strides]
    return max(FORCED_WIDTH, int(max([rows.rows * columns, *spans]) >= limit))


class Launch(NamedTuple):
    """What a launcher passes on to its kernel besides its own arguments: `*geometry` and `**options`."""

    grid: tuple[int, int]
    rows: Rows
    options: dict[str, Any]

    @property
    def geometry(self) -> tuple[Any, ...]:
        return (*map(as_odd, self.rows.strides), self.rows.rows, as_odd(self.rows.inner))

    def samples(self, sample_ids: Tensor | None) -> tuple[Tensor | None, int | None]:
        """The samples' numbers and the number of rows of each, or two None, of which nothing is compiled."""
        return (None, None) if sample_ids is None else (sample_ids, self.rows.rows // sample_ids.numel())


def plan(
    inputs: Sequence[Tensor | None],
    outputs: Sequence[Tensor | None],
    weights: Sequence[Tensor | None] = (),
    *,
    walked: bool = False,
) -> Launch:
    """The launch for `[..., d]` inputs of any strides and contiguous outputs, all of one shape.

    The grid is one of blocks of rows and of pieces of them, or, `walked`, of rows alone: a program takes all pieces.
    `weights` are `[...]`, of any strides: one number for each row. Their strides follow those of the inputs.
    """
    full = [tensor for tensor in (*inputs, *outputs) if tensor is not None]
    shape = full[0].shape
    # Seen as [..., d] like the rest, the weights fold into rows together with everything else.
    rows = as_rows(shape, [*inputs, *(None if w is None else w.unsqueeze(-1).expand(shape) for w in weights)])
    columns = shape[-1]
    itemsize = max(tensor.element_size() for tensor in full)
    vector = min(alignment(tensor) // tensor.element_size() for tensor in full)
    block = block_for(columns, itemsize, vector)
    options = {
        "COLUMNS": columns,
        "ALIGN": tuple(0 if tensor is None else alignment(tensor) for tensor in inputs),
        "WIDTH": width_of(rows, columns),
        "BLOCK_ROWS": block.rows,
        "BLOCK_COLUMNS": block.columns,
        "PARTS": block.per_thread // 4,
        "num_warps": block.warps,
    }
    grid = triton.cdiv(rows.rows, block.rows), 1 if walked else triton.cdiv(columns, block.columns)
    if grid[1] > _MAX_PIECES:
        raise ValueError(
            f"the Triton kernels take rows of at most {_MAX_PIECES * block.columns} columns, not {columns}"
        )
    return Launch(grid, rows, options)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, so make the tensor's device current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
