"""The entry that stands for all tokens that a window has left behind: it begins a running softmax.

What it computes: `reference_summaries.dropped_mean` (RazorAttention, arXiv 2407.15891). A row at
position t sees from f = t - window_size + 1 on and has dropped N = f - sink_size tokens. Neither
mean is ever written out: with K and V the sums up to the block of f, and over j the tokens of that
block from the sinks' end to f,

    logit  = sm_scale * (q.K + sum_j q.k_j) / N + ln N        (capped before ln N is added)
    result = (V + sum_j v_j) / N

and the inner sums are products of matrices, as in attention, with weights of 0 and 1.
"""

import triton
import triton.language as tl

from headlong.kernels.triton_codes import (
    INT4,
    PLAIN,
    describe_formats,
    load_scales,
    load_tile,
    raised,
    scaled_products,
)
from headlong.kernels.triton_pages import (
    GROUPS_FIELDS,
    UNIT,
    load_blocks,
    row_offsets,
    scale_offsets,
    scaled_logits,
)
from headlong.kernels.triton_rows import SUMS_FIELD, load_block, locate_section

DROPPED_KEYS = tl.constexpr(16)
"""Tokens that are read at a time: the least that a matrix instruction takes."""


def describe_sums(formats: int) -> str:
    """A set of formats of pages that have sums for people, " compensated int8" for example."""
    return f" compensated{describe_formats(formats)}" if formats else ""


@triton.jit
def is_compensated(groups_ptr, group):
    """Whether a group's pages have sums: they are what a page ends with."""
    fields_ptr = groups_ptr + group * GROUPS_FIELDS
    return tl.load(fields_ptr + SUMS_FIELD) < tl.load(fields_ptr + 1)


@triton.jit
def locate_sums(groups_ptr, group, page, floats_ptr):
    """Sums of a head's page in block 0."""
    return floats_ptr + locate_section(groups_ptr, group, page, SUMS_FIELD) * (UNIT // 4)


@triton.jit
def is_between(positions, begins, ends):
    """Which positions are among each row's own, [rows, positions]."""
    positions = positions[None, :]
    return (positions >= begins[:, None]) & (positions < ends[:, None])


@triton.jit
def start_with_dropped(
    query,
    query_sums,
    t,
    nearest,
    farthest,
    is_wanted,
    sink_size,
    window_size,
    table_ptr,
    sink_blocks,
    gone_blocks,
    keys_ptr,
    values_ptr,
    scales_ptr,
    minima_ptr,
    sums_ptr,
    block_units,
    block_shift,
    scale,
    softcap,
    FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ITEMSIZE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    """A running softmax over what rows at positions `t` dropped, for `accumulate` to go on with.

    Positions are from `nearest` to `farthest`; of rows past these nothing is asked. If it is not
    wanted, or for rows that dropped nothing, the softmax has seen no key.
    """
    dims = tl.arange(0, DIM)
    # What is visible first; as the window may be unbounded it is compared before it is subtracted.
    first_visible = tl.minimum(t, farthest) - window_size + 1
    some = (first_visible > sink_size) & is_wanted
    counts = tl.where(some, tl.maximum(first_visible, 0) - sink_size, 1).to(tl.float32)

    # From the block of what the first row that dropped anything sees first, to that of the last.
    begin = tl.maximum(nearest - window_size + 1, sink_size) >> block_shift << block_shift
    end = farthest - window_size + 1
    is_wanted &= end > sink_size
    last = tl.where(is_wanted, end + 1, begin)
    end = tl.where(is_wanted, end, begin)
    row_blocks = first_visible >> block_shift << block_shift
    row_begins = tl.maximum(row_blocks, sink_size)

    # Keys before values, so that the results take no registers meanwhile. The rounds are few, and
    # nothing in them need be ahead of its time.
    products = tl.zeros(t.shape, tl.float32)
    for first in tl.range(begin, last, 1 << block_shift, num_stages=1):
        block = load_block(first >> block_shift, table_ptr, sink_blocks, gone_blocks)
        pointers = sums_ptr + block.to(tl.int64) * block_units * (UNIT // 4) + dims
        sums = tl.load(pointers, mask=dims < HEAD_DIM, other=0.0)
        here = some & (row_blocks == first)
        products = tl.where(here, tl.sum(query.to(tl.float32) * sums[None, :], 1), products)
    for first in tl.range(begin, end, DROPPED_KEYS, num_stages=1):
        positions = first + tl.arange(0, DROPPED_KEYS)
        read = (positions >= sink_size) & (positions < end)
        blocks = load_blocks(positions, read, table_ptr, sink_blocks, gone_blocks, block_shift)
        rows = row_offsets(blocks, positions, block_units, block_shift, FORMAT, HEAD_DIM, ITEMSIZE)
        scale_at = scale_offsets(blocks, positions, block_units, block_shift)
        keys = load_tile(
            keys_ptr, rows, read, 0, FORMAT, HEAD_DIM, DIM, True, NATIVE_FP8, query.dtype
        )
        scales, _ = load_scales(scales_ptr, scale_at, read, block_shift, True, FORMAT != PLAIN)
        minima, _ = load_scales(minima_ptr, scale_at, read, block_shift, True, FORMAT == INT4)
        one_by_one = tl.dot(query, keys, input_precision="ieee")
        one_by_one = scaled_products(one_by_one, query_sums, scales, minima, FORMAT)
        dropped = is_between(positions, row_begins, first_visible)
        products += tl.sum(tl.where(dropped, one_by_one, 0.0), 1)

    acc = tl.zeros([t.shape[0], DIM], tl.float32)
    for first in tl.range(begin, last, 1 << block_shift, num_stages=1):
        block = load_block(first >> block_shift, table_ptr, sink_blocks, gone_blocks)
        pointers = sums_ptr + block.to(tl.int64) * block_units * (UNIT // 4) + dims
        sums = tl.load(pointers + HEAD_DIM, mask=dims < HEAD_DIM, other=0.0)[None, :]
        if FORMAT != PLAIN:
            sums = raised(sums, tl.full([DIM], 1.0, tl.float32), FORMAT)
        here = some & (row_blocks == first)
        acc = tl.where(here[:, None], sums, acc)
    for first in tl.range(begin, end, DROPPED_KEYS, num_stages=1):
        positions = first + tl.arange(0, DROPPED_KEYS)
        read = (positions >= sink_size) & (positions < end)
        blocks = load_blocks(positions, read, table_ptr, sink_blocks, gone_blocks, block_shift)
        rows = row_offsets(blocks, positions, block_units, block_shift, FORMAT, HEAD_DIM, ITEMSIZE)
        scale_at = scale_offsets(blocks, positions, block_units, block_shift)
        values = load_tile(
            values_ptr, rows, read, 1, FORMAT, HEAD_DIM, DIM, True, NATIVE_FP8, query.dtype
        )
        _, scales = load_scales(scales_ptr, scale_at, read, block_shift, True, FORMAT != PLAIN)
        _, minima = load_scales(minima_ptr, scale_at, read, block_shift, True, FORMAT == INT4)
        weights = tl.where(is_between(positions, row_begins, first_visible), 1.0, 0.0)
        if FORMAT == INT4:
            acc += tl.sum(raised(weights, minima, FORMAT), 1)[:, None]
        if FORMAT != PLAIN:
            weights = raised(weights, scales, FORMAT)
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")

    logits = scaled_logits(products / counts, scale, softcap, SOFTCAP) + tl.log2(counts)
    largest = tl.where(some, logits, float("-inf"))
    return acc / counts[:, None], tl.where(some, 1.0, 0.0), largest
