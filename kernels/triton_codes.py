"""Rows of K and V as pages hold them, read and written in tiles: `kernels.codes` for Triton.

Codes are multiplied as they are, exact in the dtype of the queries; scales and minima are applied
to logits and to weights, in float32:

    q.k            = scale * (q.codes) + minimum * sum(q)
    sum_j w_j v_j  = sum_j (w_j scale_j) codes_j + sum_j w_j minimum_j

A kernel is compiled for a set of formats. The format of a head's pages is in the table of groups;
where the set is of one, nothing is left of the choice.
"""

from collections.abc import Sequence

import triton
import triton.language as tl

from headlong.kernels.layout import PageLayout

FORMAT_NAMES = ("none", "int8", "fp8", "int4")
"""In the order of their numbers in the table of groups."""

PLAIN = tl.constexpr(0)
INT8 = tl.constexpr(1)
FP8 = tl.constexpr(2)
INT4 = tl.constexpr(3)
NUM_FORMATS = tl.constexpr(4)

LARGEST_HALF = tl.constexpr(65504.0)
LARGEST_FP8 = tl.constexpr(448.0)
# Added to a float32 of less than 2**22 and taken away again, it leaves the nearest integer.
ROUNDER = tl.constexpr(12582912.0)


def page_format(page: PageLayout) -> int:
    """Number of a page's format."""
    return FORMAT_NAMES.index("none" if page.quantisation is None else page.quantisation.name)


def page_formats(pages: Sequence[PageLayout]) -> int:
    """The set of the formats of pages: a bit for each, counted from the lowest."""
    formats = 0
    for page in pages:
        formats |= 1 << page_format(page)
    return formats


def describe_formats(formats: int) -> str:
    """A set of formats for people, " none+int4" for example; nothing if pages are plain."""
    names = [name for number, name in enumerate(FORMAT_NAMES) if formats >> number & 1]
    return "" if names == ["none"] else " " + "+".join(names)


@triton.jit
def load_tile(
    section_ptr,
    starts,
    read,
    AXIS: tl.constexpr,
    FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    IS_MASKED: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Rows that begin at `starts`, or their codes: [DIM, rows] along axis 0, [rows, DIM] along 1.

    Rows that are not to be read are 0, and so is what pads them to DIM.
    """
    halves: tl.constexpr = 2 if FORMAT == INT4 else 1
    columns = tl.arange(0, DIM // halves)
    real = columns < HEAD_DIM // halves
    # Nibbles are put in order along the last axis.
    if AXIS == 0 and FORMAT != INT4:
        pointers = section_ptr + starts[None, :] + columns[:, None]
        real = real[:, None]
        read = read[None, :]
    else:
        pointers = section_ptr + starts[:, None] + columns[None, :]
        real = real[None, :]
        read = read[:, None]
    if IS_MASKED:
        tile = tl.load(pointers, mask=read & real, other=0)
    elif HEAD_DIM == DIM:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=real, other=0)
    if FORMAT == INT8:
        tile = tile.to(tl.int8, bitcast=True)
    elif FORMAT == INT4:
        low = (tile & 15).to(tl.int8, bitcast=True).to(DTYPE)
        high = (tile >> 4).to(tl.int8, bitcast=True).to(DTYPE)
        tile = tl.interleave(low, high)
        if AXIS == 0:
            tile = tl.trans(tile)
    elif FORMAT == FP8:
        if NATIVE_FP8:
            tile = tile.to(tl.float8e4nv, bitcast=True)
        else:
            # In the places of a float16, whose exponents count from 8 further down.
            bits = ((tile & 0x80).to(tl.int16) << 8) | ((tile & 0x7F).to(tl.int16) << 7)
            tile = bits.to(tl.float16, bitcast=True) * 256.0
    return tile.to(DTYPE)


@triton.jit
def load_scales(
    section_ptr,
    offsets,
    read,
    block_shift,
    IS_MASKED: tl.constexpr,
    IS_THERE: tl.constexpr,
):
    """Scales or minima of keys and of values, float32; where a format has none, zeros."""
    if IS_THERE:
        pointers = section_ptr + offsets
        # What the law hides may hold anything, NaN included: it is not read.
        mask = read if IS_MASKED else None
        other = 0.0 if IS_MASKED else None
        of_keys = tl.load(pointers, mask=mask, other=other).to(tl.float32)
        of_values = tl.load(pointers + (1 << block_shift), mask=mask, other=other).to(tl.float32)
    else:
        of_keys = tl.zeros(offsets.shape, tl.float32)
        of_values = of_keys
    return of_keys, of_values


@triton.jit
def scaled_products(products, query_sums, scales, minima, FORMAT: tl.constexpr):
    """q.k of products of queries and codes."""
    if FORMAT != PLAIN:
        products *= scales[None, :]
    if FORMAT == INT4:
        products += query_sums[:, None] * minima[None, :]
    return products


@triton.jit
def raised(weights, scales, FORMAT: tl.constexpr):
    """Weights of codes, times a power of two.

    Without it they could be so small that float16 loses digits, or all of them. The largest scale
    does not overflow with it.
    """
    return (
        weights * (scales * (64.0 if FORMAT == INT8 else 256.0 if FORMAT == FP8 else 4.0))[None, :]
    )


@triton.jit
def lowered(acc, FORMAT: tl.constexpr):
    """What `raised` weights have summed up, without the power of two."""
    if FORMAT == INT8:
        acc *= 1.0 / 64.0
    elif FORMAT == FP8:
        acc *= 1.0 / 256.0
    elif FORMAT == INT4:
        acc *= 1.0 / 4.0
    return acc


@triton.jit
def quantise_tile(x, real, FORMAT: tl.constexpr):
    """Codes uint8 of rows [rows, DIM] in float32, their scales and minima float16 [rows].

    Only what is `real` counts. Every operation is rounded as PyTorch rounds it.
    """
    if FORMAT == INT4:
        minima = tl.min(tl.where(real, x, float("inf")), 1)
        minima = tl.minimum(tl.maximum(minima, -LARGEST_HALF), LARGEST_HALF).to(tl.float16)
        x = x - minima.to(tl.float32)[:, None]
        spread = tl.max(tl.where(real, x, float("-inf")), 1)
        scales = half_scale(spread, 15.0)
        codes = nearest(divided(x, scales), 0.0, 15.0).to(tl.uint8)
    else:
        spread = tl.max(tl.where(real, tl.abs(x), 0.0), 1)
        scales = half_scale(spread, 127.0 if FORMAT == INT8 else LARGEST_FP8)
        minima = scales
        x = divided(x, scales)
        if FORMAT == INT8:
            codes = (nearest(x, -127.0, 127.0).to(tl.int32) & 0xFF).to(tl.uint8)
        else:
            codes = fp8_codes(x)
    return codes, scales, minima


@triton.jit
def half_scale(spread, steps):
    """Scale of rows whose elements spread so far: at most what a float16 holds."""
    return tl.minimum(tl.div_rn(spread, steps), LARGEST_HALF).to(tl.float16)


@triton.jit
def divided(x, scales):
    """Rows by their scales; 0 where there is none."""
    scales = scales.to(tl.float32)[:, None]
    some = scales > 0.0
    return tl.where(some, tl.div_rn(x, tl.where(some, scales, 1.0)), 0.0)


@triton.jit
def nearest(x, least, greatest):
    """The nearest integer from `least` to `greatest`, the even one of two."""
    return (tl.minimum(tl.maximum(x, least), greatest) + ROUNDER) - ROUNDER


@triton.jit
def fp8_codes(x):
    """Nearest float8 e4m3, saturating, the even one of two. No instruction of sm_80 does it."""
    x = tl.minimum(tl.maximum(x, -LARGEST_FP8), LARGEST_FP8)
    bits = x.to(tl.int32, bitcast=True)
    exponent = tl.maximum(((bits >> 23) & 0xFF) - 127, -6)
    # 2 ** (3 - exponent): what makes a step of this exponent 1.
    per_step = ((130 - exponent) << 23).to(tl.float32, bitcast=True)
    steps = nearest(tl.abs(x) * per_step, 0.0, 16.0).to(tl.int32)
    return (((bits >> 24) & 0x80) | (((exponent + 6) << 3) + steps)).to(tl.uint8)
