"""One split of a decode: the running softmax over some of the keys that a head sees."""

import triton
import triton.language as tl

from headlong.kernels.triton_codes import (
    INT4,
    PLAIN,
    load_scales,
    load_tile,
    lowered,
    scaled_products,
)
from headlong.kernels.triton_compensation import start_with_dropped
from headlong.kernels.triton_pages import (
    accumulate,
    load_blocks,
    row_offsets,
    scale_offsets,
    scaled_logits,
    sees,
)


@triton.jit
def place_keys(first, sink_end, gap, KEYS: tl.constexpr):
    """Positions of a tile of keys by their count, which leaves the gap behind the sinks out."""
    return first + tl.where(first < sink_end, 0, gap) + tl.arange(0, KEYS)


@triton.jit
def attend_split(
    query,
    context,
    split,
    table_ptr,
    sink_blocks,
    gone_blocks,
    sink_size,
    window_size,
    keys_ptr,
    values_ptr,
    scales_ptr,
    minima_ptr,
    sums_ptr,
    is_compensated,
    block_units,
    block_shift,
    scale,
    softcap,
    FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    KEY_ALIGNMENT: tl.constexpr,
    ITEMSIZE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    COMPENSATED: tl.constexpr,
):
    """Running softmax of a tile of query heads over one split of the keys they see.

    What stands for those that they do not see any more belongs to the first split.
    """
    # Keys are counted from the sinks on, then from the window on: see `key_span`.
    sink_end = tl.cdiv(tl.minimum(sink_size, context), KEY_ALIGNMENT) * KEY_ALIGNMENT
    window_low = tl.maximum(context - window_size, 0)
    window_base = tl.maximum(window_low // KEY_ALIGNMENT * KEY_ALIGNMENT, sink_end)
    gap = window_base - sink_end
    first_key = split * SPLIT_KEYS
    last_key = tl.minimum(first_key + SPLIT_KEYS, sink_end + tl.maximum(context - window_base, 0))

    query_sums = tl.sum(query.to(tl.float32), 1)
    positions = place_keys(first_key, sink_end, gap, KEYS)
    seen = sees(context - 1, positions, sink_size, window_size)
    blocks = load_blocks(positions, seen, table_ptr, sink_blocks, gone_blocks, block_shift)
    if COMPENSATED >> FORMAT & 1:
        t = context - 1 + tl.zeros([ROWS], tl.int32)
        acc, total, largest = start_with_dropped(
            query, query_sums, t, context - 1, context - 1, is_compensated & (split == 0),
            sink_size, window_size, table_ptr, sink_blocks, gone_blocks, keys_ptr, values_ptr,
            scales_ptr, minima_ptr, sums_ptr, block_units, block_shift, scale, softcap, FORMAT,
            HEAD_DIM, DIM, ITEMSIZE, SOFTCAP, NATIVE_FP8,
        )  # fmt: skip
    else:
        acc = tl.zeros([ROWS, DIM], tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        largest = tl.full([ROWS], float("-inf"), tl.float32)
    for key in range(first_key, last_key, KEYS):
        rows = row_offsets(blocks, positions, block_units, block_shift, FORMAT, HEAD_DIM, ITEMSIZE)
        scale_at = scale_offsets(blocks, positions, block_units, block_shift)
        read = seen
        positions = place_keys(key + KEYS, sink_end, gap, KEYS)
        seen = sees(context - 1, positions, sink_size, window_size)
        blocks = load_blocks(positions, seen, table_ptr, sink_blocks, gone_blocks, block_shift)
        # What the law hides may hold anything, NaN included: it is not read.
        keys = load_tile(
            keys_ptr, rows, read, 0, FORMAT, HEAD_DIM, DIM, True, NATIVE_FP8, query.dtype
        )
        values = load_tile(
            values_ptr, rows, read, 1, FORMAT, HEAD_DIM, DIM, True, NATIVE_FP8, query.dtype
        )
        key_scales, value_scales = load_scales(
            scales_ptr, scale_at, read, block_shift, True, FORMAT != PLAIN
        )
        key_minima, value_minima = load_scales(
            minima_ptr, scale_at, read, block_shift, True, FORMAT == INT4
        )
        products = tl.dot(query, keys, input_precision="ieee")
        products = scaled_products(products, query_sums, key_scales, key_minima, FORMAT)
        logits = scaled_logits(products, scale, softcap, SOFTCAP)
        logits = tl.where(read[None, :], logits, float("-inf"))
        acc, total, largest = accumulate(
            acc, total, largest, logits, values, value_scales, value_minima, FORMAT
        )
    return lowered(acc, FORMAT), total, largest
