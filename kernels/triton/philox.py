"""Device functions for the noise that `amvl_fast.ops.philox` defines: the same words, the same normals.

Everything is made of integer operations, float32 multiplications and additions and one square root, so that
the result is the same to a few float32 roundings on every target and under the interpreter.
"""

import triton
import triton.language as tl


@triton.jit
def minus_log(word):
    """`-ln((word + 1/2) / 2**32)` for a uint32 word, accurate relative to its own size everywhere.

    Near word = 2**32 the logarithm is about the gap to 1, which float32 cannot see in u but an integer can:
    there the gap is taken from the complement of the word before anything is rounded.
    """
    near_one = word >= 0xB504F334  # u above sqrt(1/2)
    gap = (word ^ 0xFFFFFFFF).to(tl.float32) + 0.5
    x = word.to(tl.float32) + 0.5
    # x = m * 2**exponent with m in [sqrt(1/2), sqrt(2)), by its bits.
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    f = tl.where(near_one, gap * -2.3283064365386963e-10, m - 1.0)
    exponent = tl.where(near_one, 0, exponent - 32).to(tl.float32)
    # log1p(f) = f - f**2 / 2 + f**3 * p(f): minimax coefficients of Cephes' logf (Moshier).
    p = f * 7.0376836292e-2 - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    square = f * f
    # ln 2 in two parts, the first short enough for its product with the exponent to be exact.
    log = (p * f * square - exponent * 2.12194440e-4) - 0.5 * square
    return -(log + f + exponent * 0.693359375)


@triton.jit
def cos_sin(word):
    """Cosine and sine of `2 pi word / 2**32` for a uint32 word.

    The nearest quarter turn comes off as an integer, so the range reduction is exact and costs no memory.
    """
    quarter = tl.add(word, 0x20000000, sanitize_overflow=False) >> 30
    rest = tl.sub(word, quarter << 30, sanitize_overflow=False).to(tl.int32, bitcast=True)
    a = rest.to(tl.float32) * 1.4629180792671596e-9  # 2 pi / 2**32, so |a| <= pi / 4
    s = a * a
    # Minimax coefficients of Cephes' sinf and cosf.
    sine = ((-1.9515295891e-4 * s + 8.3321608736e-3) * s - 1.6666654611e-1) * s * a + a
    cosine = ((2.443315711809948e-5 * s - 1.388731625493765e-3) * s + 4.166664568298827e-2) * s * s - 0.5 * s + 1.0
    odd = (quarter & 1) != 0
    x = tl.where(odd, sine, cosine)
    y = tl.where(odd, cosine, sine)
    return tl.where((quarter == 1) | (quarter == 2), -x, x), tl.where(quarter >= 2, -y, y)


@triton.jit
def box_muller(word0, word1):
    """Two normals from two words: the first gives the radius, the second the angle."""
    radius = tl.sqrt(2.0 * minus_log(word0))
    cosine, sine = cos_sin(word1)
    return radius * cosine, radius * sine


@triton.jit
def philox_words(seed, stream, row, first_group, GROUPS: tl.constexpr, STEP: tl.constexpr = 1):
    """The four words of every STEP-th counter, `[rows, GROUPS]`; `seed` is int64, `row` int32 or int64.

    `tl.philox` gives the same words, but takes the halves of each product from two multiplications.
    """
    c0 = (first_group + STEP * tl.arange(0, GROUPS)).to(tl.uint32)[None, :]
    c1 = row.to(tl.uint32)[:, None]
    if row.dtype == tl.int64:
        c2 = (row >> 32).to(tl.uint32)[:, None]
    else:
        c2 = tl.zeros_like(c1)
    c3 = tl.to_tensor(stream).to(tl.uint32)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def philox_normal(seed, stream, row, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr = 1):
    """The `[ROWS, COLUMNS]` block of normals of every STEP-th counter, from column `start`, a multiple of four.

    `seed` is best loaded just before: outside a loop over columns, it becomes round keys that fill registers.
    """
    w0, w1, w2, w3 = philox_words(seed, stream, row, start // 4, COLUMNS // 4, STEP)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    # A join adds a last dimension of two, so this order puts the four normals of a counter side by side.
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [ROWS, COLUMNS])
