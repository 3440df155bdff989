"""Device functions that move blocks between memory and registers: offsets, loads, stores, and parts of blocks.

`WIDTH` says which indices need 64 bits; `layout.width_of` decides.
"""

import triton
import triton.language as tl


@triton.jit
def block_rows(BLOCK_ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The numbers of this program's rows."""
    program = tl.program_id(0)
    if WIDTH == 2:
        program = program.to(tl.int64)
    return program * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)


@triton.jit
def block_start(COLUMNS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The first column of this program's piece; a constant where rows are not cut into pieces."""
    start = 0
    if COLUMNS > BLOCK_COLUMNS:
        start = tl.program_id(1) * BLOCK_COLUMNS
    return start


@triton.jit
def block_mask(row, rows, start, COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Which elements of a block there are. What is known when compiling costs no comparison."""
    mask = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], True, tl.int1)
    if BLOCK_ROWS > 1:  # or the grid has a program for each row and no more
        mask = mask & (row < rows)[:, None]
    if COLUMNS % BLOCK_COLUMNS != 0:
        mask = mask & (start + tl.arange(0, BLOCK_COLUMNS) < COLUMNS)[None, :]
    return mask


@triton.jit
def widen(index, WIDTH: tl.constexpr):
    """The index in the type of offsets; before any multiplication, for products are what overflows."""
    return tl.to_tensor(index).to(tl.int64) if WIDTH > 0 else index


@triton.jit
def from_odd(number):
    """A number that `layout.as_odd` kept from being specialised."""
    return (number - 3) >> 1


@triton.jit
def quotient(row, size, WIDTH: tl.constexpr):
    """The number of a row divided by a size, rounded down."""
    # Rows are never negative, and an unsigned division is shorter.
    return (row.to(tl.uint32) // size.to(tl.uint32)).to(tl.int32) if WIDTH < 2 else row // size


@triton.jit
def row_offset(row, inner, strides, WIDTH: tl.constexpr):
    """Where rows begin in a tensor of the given strides; both tuples as `layout.Launch.geometry` has them."""
    DIMENSIONS: tl.constexpr = len(inner)
    offset = 0
    for i in tl.static_range(DIMENSIONS):
        size = from_odd(inner[DIMENSIONS - 1 - i])
        outer = quotient(row, size, WIDTH)
        offset += widen(row - outer * size, WIDTH) * from_odd(strides[DIMENSIONS - i])
        row = outer
    return offset + widen(row, WIDTH) * from_odd(strides[0])


@triton.jit
def load(pointer, offset, start, strides, mask, ALIGN: tl.constexpr, WIDTH: tl.constexpr):
    """A `[rows, columns]` block from column `start`, as it is in memory; `part` casts it.

    Rows begin at multiples of ALIGN bytes, or ALIGN is 0: columns lie apart. Where they do not, only a row's
    pointer moves with `start`. What it takes from there to a column is no register but part of the instruction.
    """
    column = tl.arange(0, mask.shape[1])
    if ALIGN == 0:
        stride = from_odd(strides[len(strides) - 1])
        first = offset + widen(start, WIDTH) * stride
        where = pointer + (first[:, None] + (widen(column, WIDTH) * stride)[None, :])
    else:
        where = tl.multiple_of(pointer + (offset + start), ALIGN)[:, None] + column[None, :]
    return tl.load(where, mask=mask, other=0.0)


@triton.jit
def part(block, INDEX: tl.constexpr, PARTS: tl.constexpr):
    """One part of a block in float32: of each thread's columns the first or the second four, if it has eight.

    The cast comes first: nothing is computed in a narrower dtype.
    """
    if PARTS == 2:
        ROWS: tl.constexpr = block.shape[0]
        COLUMNS: tl.constexpr = block.shape[1]
        pairs = tl.permute(tl.reshape(block, [ROWS, COLUMNS // 8, 2, 4]), (0, 1, 3, 2))
        block = tl.reshape(tl.split(pairs)[INDEX], [ROWS, COLUMNS // 2])
    return block.to(tl.float32)


@triton.jit
def append(block, value, dtype: tl.constexpr):
    """A block with its next part, cast to what it will be stored as; None is a block without parts."""
    value = value.to(dtype)
    if block is not None:
        ROWS: tl.constexpr = value.shape[0]
        COLUMNS: tl.constexpr = value.shape[1]
        fours: tl.constexpr = [ROWS, COLUMNS // 4, 4]
        pairs = tl.join(tl.reshape(block, fours), tl.reshape(value, fours))
        value = tl.reshape(tl.permute(pairs, (0, 1, 3, 2)), [ROWS, 2 * COLUMNS])
    return value


@triton.jit
def sum_of_fours(block):
    """Sums of four columns each, mostly of one thread: fewer registers to carry on."""
    ROWS: tl.constexpr = block.shape[0]
    COLUMNS: tl.constexpr = block.shape[1]
    return tl.sum(tl.reshape(block, [ROWS, COLUMNS // 4, 4]), axis=2)


@triton.jit
def load_row(pointer, row, inner, strides, rows, WIDTH: tl.constexpr):
    """One number for each row, `[rows, 1]` in float32; None for None."""
    value = None
    if pointer is not None:
        where = row_offset(row, inner, strides, WIDTH)
        value = tl.load(pointer + where, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    return value


@triton.jit
def row_number(row, rows, sample_ids, sample_rows, WIDTH: tl.constexpr):
    """The numbers by which rows enter the noise, as `amvl_fast.ops.philox` defines them; int64 with sample ids.

    A sample has `sample_rows` rows; both arguments as `layout.Launch.samples` has them.
    """
    number = row
    if sample_ids is not None:
        sample = quotient(row, sample_rows, WIDTH)
        sample_id = tl.load(sample_ids + sample, mask=row < rows, other=0)
        # With r % m = r - sample * m: a row keeps its place within the sample, and moves by whole samples.
        samples = tl.sub(sample_id, sample, sanitize_overflow=False)
        moved = tl.mul(samples, sample_rows.to(tl.int64), sanitize_overflow=False)
        number = tl.add(row, moved, sanitize_overflow=False)
    return number


@triton.jit
def store(pointer, row, start, value, mask, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Write a `[rows, columns]` block of a contiguous tensor, in its own dtype."""
    if pointer is not None:
        where = (pointer + (widen(row, WIDTH) * COLUMNS + start))[:, None] + tl.arange(0, mask.shape[1])[None, :]
        tl.store(where, value, mask=mask)


@triton.jit
def add(total, term):
    """The sum of two terms that may be None."""
    if total is None:
        return term
    elif term is None:
        return total
    else:
        return total + term


@triton.jit
def append_gradient(pointer, block, value, SHAPE: tl.constexpr):
    """The block of a gradient with its next part: 0 if no term contributes, nothing if nobody asked for it."""
    if pointer is not None:
        if value is None:
            value = tl.zeros(SHAPE, tl.float32)
        block = append(block, value, pointer.dtype.element_ty)
    return block
