"""A kernel that shows the noise of any row. Its own file, for Triton reads the sources of kernels."""

import triton
import triton.language as tl

from amvl_fast.kernels.triton.philox import philox_normal, philox_words


@triton.jit(do_not_specialize=["stream", "first_row", "first_group"])
def noise_probe(words, normals, seed, stream, first_row, first_group, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """The words `[ROWS, GROUPS, 4]` of a block of counters, and its normals `[ROWS, 4 * GROUPS]`."""
    index = tl.arange(0, ROWS)
    row = tl.to_tensor(first_row).to(tl.int64) + index
    group = tl.arange(0, GROUPS)
    seed = tl.load(seed)
    w0, w1, w2, w3 = philox_words(seed, stream, row, first_group, GROUPS)
    where = words + (index[:, None] * GROUPS + group[None, :]) * 4
    tl.store(where, w0.to(tl.int32, bitcast=True))
    tl.store(where + 1, w1.to(tl.int32, bitcast=True))
    tl.store(where + 2, w2.to(tl.int32, bitcast=True))
    tl.store(where + 3, w3.to(tl.int32, bitcast=True))
    column = tl.arange(0, 4 * GROUPS)
    block = philox_normal(seed, stream, row, 4 * first_group, ROWS, 4 * GROUPS)
    tl.store(normals + index[:, None] * 4 * GROUPS + column[None, :], block)
