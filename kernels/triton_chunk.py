"""A tile of a prefill chunk's rows against a range of keys: the running softmax, masked or not."""

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

MASKED = tl.constexpr(True)
UNMASKED = tl.constexpr(False)


@triton.jit
def attend_keys(
    acc,
    total,
    largest,
    query,
    query_sums,
    t,
    first,
    last,
    jump_at,
    jump,
    nearest,
    farthest,
    sink_size,
    window_size,
    table_ptr,
    sink_blocks,
    gone_blocks,
    keys_ptr,
    values_ptr,
    scales_ptr,
    minima_ptr,
    block_units,
    block_shift,
    scale,
    softcap,
    FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    IS_MASKED: tl.constexpr,
    ITEMSIZE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    """Take in the keys counted from `first` to `last` - 1.

    From the count `jump_at` on, `jump` is added to it. Under the mask only keys are read that some
    row from position `nearest` to `farthest` sees.
    """
    positions = first + tl.where(first < jump_at, 0, jump) + tl.arange(0, KEYS)
    wanted = positions <= farthest
    if IS_MASKED:
        wanted &= (positions < sink_size) | (positions > nearest - window_size)
    blocks = load_blocks(positions, wanted, table_ptr, sink_blocks, gone_blocks, block_shift)
    for key in range(first, last, KEYS):
        rows = row_offsets(blocks, positions, block_units, block_shift, FORMAT, HEAD_DIM, ITEMSIZE)
        scale_at = scale_offsets(blocks, positions, block_units, block_shift)
        here = positions
        read = wanted
        positions = key + KEYS + tl.where(key + KEYS < jump_at, 0, jump) + tl.arange(0, KEYS)
        wanted = positions <= farthest
        if IS_MASKED:
            wanted &= (positions < sink_size) | (positions > nearest - window_size)
        blocks = load_blocks(positions, wanted, table_ptr, sink_blocks, gone_blocks, block_shift)
        keys = load_tile(
            keys_ptr, rows, read, 0, FORMAT, HEAD_DIM, DIM, IS_MASKED, NATIVE_FP8, query.dtype
        )
        values = load_tile(
            values_ptr, rows, read, 1, FORMAT, HEAD_DIM, DIM, IS_MASKED, NATIVE_FP8, query.dtype
        )
        key_scales, value_scales = load_scales(
            scales_ptr, scale_at, read, block_shift, IS_MASKED, FORMAT != PLAIN
        )
        key_minima, value_minima = load_scales(
            minima_ptr, scale_at, read, block_shift, IS_MASKED, FORMAT == INT4
        )
        products = tl.dot(query, keys, input_precision="ieee")
        products = scaled_products(products, query_sums, key_scales, key_minima, FORMAT)
        logits = scaled_logits(products, scale, softcap, SOFTCAP)
        if IS_MASKED:
            seen = sees(t[:, None], here[None, :], sink_size, window_size)
            logits = tl.where(seen, logits, float("-inf"))
        acc, total, largest = accumulate(
            acc, total, largest, logits, values, value_scales, value_minima, FORMAT
        )
    return acc, total, largest


@triton.jit
def attend_chunk(
    query,
    t,
    nearest,
    farthest,
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
    ITEMSIZE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    COMPENSATED: tl.constexpr,
):
    """Running softmax of a tile of rows at positions `t`, from `nearest` to `farthest`."""
    # Tiles of keys: sinks to sink_end, the window's edge from left to inner, what every row sees
    # from inner to diagonal, and the rest to end.
    end = farthest + 1
    sink_end = tl.cdiv(tl.minimum(sink_size, end), KEYS) * KEYS
    left = tl.maximum(tl.maximum(nearest - window_size + 1, 0) // KEYS * KEYS, sink_end)
    inner = tl.cdiv(tl.maximum(farthest - window_size + 1, 0), KEYS) * KEYS
    inner = tl.minimum(tl.maximum(inner, left), tl.maximum(tl.cdiv(end, KEYS) * KEYS, left))
    diagonal = tl.maximum((nearest + 1) // KEYS * KEYS, inner)

    query_sums = tl.sum(query.to(tl.float32), 1)
    if COMPENSATED >> FORMAT & 1:
        acc, total, largest = start_with_dropped(
            query, query_sums, t, nearest, farthest, is_compensated, sink_size, window_size,
            table_ptr, sink_blocks, gone_blocks, keys_ptr, values_ptr, scales_ptr, minima_ptr,
            sums_ptr, block_units, block_shift, scale, softcap, FORMAT, HEAD_DIM, DIM,
            ITEMSIZE, SOFTCAP, NATIVE_FP8,
        )  # fmt: skip
    else:
        acc = tl.zeros([ROWS, DIM], tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        largest = tl.full([ROWS], float("-inf"), tl.float32)
    edge_end = sink_end + inner - left
    acc, total, largest = attend_keys(
        acc, total, largest, query, query_sums, t, 0, edge_end, sink_end, left - sink_end, nearest,
        farthest, sink_size, window_size, table_ptr, sink_blocks, gone_blocks, keys_ptr, values_ptr,
        scales_ptr, minima_ptr, block_units, block_shift, scale, softcap, FORMAT, HEAD_DIM, DIM,
        KEYS, MASKED, ITEMSIZE, SOFTCAP, NATIVE_FP8,
    )  # fmt: skip
    acc, total, largest = attend_keys(
        acc, total, largest, query, query_sums, t, inner, diagonal, 0, 0, nearest, farthest,
        sink_size, window_size, table_ptr, sink_blocks, gone_blocks, keys_ptr, values_ptr,
        scales_ptr, minima_ptr, block_units, block_shift, scale, softcap, FORMAT, HEAD_DIM, DIM,
        KEYS, UNMASKED, ITEMSIZE, SOFTCAP, NATIVE_FP8,
    )  # fmt: skip
    acc, total, largest = attend_keys(
        acc, total, largest, query, query_sums, t, diagonal, end, 0, 0, nearest, farthest,
        sink_size, window_size, table_ptr, sink_blocks, gone_blocks, keys_ptr, values_ptr,
        scales_ptr, minima_ptr, block_units, block_shift, scale, softcap, FORMAT, HEAD_DIM, DIM,
        KEYS, MASKED, ITEMSIZE, SOFTCAP, NATIVE_FP8,
    )  # fmt: skip
    return lowered(acc, FORMAT), total, largest
