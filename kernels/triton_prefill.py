"""Prefill: chunks of new tokens against their paged keys, all heads of a layer in one launch.

What it computes: `reference.attend`, for the sequences with several new tokens, whose K and V are
in their pages already. A program takes a tile of rows, a row being a token and one of the query
heads of a KV head, so that K and V are read once for the whole query group. It walks over the keys
in tiles that begin at multiples of their size, in order: the sinks and the edge of the window under
the law's mask, the inner ones without any, the diagonal under the mask again. A retrieval head has
no sinks and no edge, a streaming head few inner tiles. A row's result therefore does not depend on
where its chunk began.
"""

import torch
import triton
import triton.language as tl

from headlong.kernels.triton_chunk import attend_chunk
from headlong.kernels.triton_codes import NUM_FORMATS, PLAIN, describe_formats
from headlong.kernels.triton_compensation import describe_sums, is_compensated, locate_sums
from headlong.kernels.triton_pages import (
    GROUP_HEADS_FIELDS,
    ROWS_FIELDS,
    load_format,
    load_table,
    locate_page,
    with_sink,
)
from headlong.kernels.triton_tiles import choose_tiles
from headlong.kernels.triton_variant import (
    TRITON_DTYPES,
    Variant,
    device_capability,
    has_fp8,
    padded_dim,
    reads_as_float32,
)


@triton.jit
def attend_pages(
    query,
    t,
    nearest,
    farthest,
    group,
    page,
    page_format,
    groups_ptr,
    elements_ptr,
    bytes_ptr,
    halves_ptr,
    sums_ptr,
    has_sums,
    sink_size,
    window_size,
    table_ptr,
    sink_blocks,
    gone_blocks,
    block_shift,
    scale,
    softcap,
    FORMATS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CODE_KEYS: tl.constexpr,
    ITEMSIZE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    COMPENSATED: tl.constexpr,
):
    """Running softmax of a tile of rows over pages of one of a set of formats.

    What is not of the first format of the set is left to the others, in the other branch: were they
    side by side, registers would be kept for one all through the other.
    """
    tl.static_assert(NUM_FORMATS == 4, "a set's first format is found among four")
    first: tl.constexpr = FORMATS & -FORMATS
    form: tl.constexpr = (first > 1) + (first > 2) + (first > 4)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    largest = tl.zeros([ROWS], tl.float32)
    if (page_format == form) | (first == FORMATS):
        keys_ptr, values_ptr, scales_ptr, minima_ptr, block_units = locate_page(
            groups_ptr, group, page, elements_ptr, bytes_ptr, halves_ptr, form, ITEMSIZE
        )
        acc, total, largest = attend_chunk(
            query, t, nearest, farthest, sink_size, window_size, table_ptr, sink_blocks,
            gone_blocks, keys_ptr, values_ptr, scales_ptr, minima_ptr, sums_ptr, has_sums,
            block_units, block_shift, scale, softcap, form, HEAD_DIM, DIM, ROWS,
            KEYS if form == PLAIN else CODE_KEYS, ITEMSIZE, SOFTCAP, NATIVE_FP8, COMPENSATED,
        )  # fmt: skip
    elif first != FORMATS:
        acc, total, largest = attend_pages(
            query, t, nearest, farthest, group, page, page_format, groups_ptr, elements_ptr,
            bytes_ptr, halves_ptr, sums_ptr, has_sums, sink_size, window_size, table_ptr,
            sink_blocks, gone_blocks, block_shift, scale, softcap, FORMATS - first, HEAD_DIM, DIM,
            ROWS, KEYS, CODE_KEYS, ITEMSIZE, SOFTCAP, NATIVE_FP8, COMPENSATED,
        )  # fmt: skip
    return acc, total, largest


@triton.jit(
    do_not_specialize=[
        "num_tiles",
        "num_seqs",
        "num_q_heads",
        "group_size",
        "block_shift",
    ]
)
def prefill_kernel(
    out_ptr,
    query_ptr,
    sinks_ptr,
    elements_ptr,
    bytes_ptr,
    halves_ptr,
    floats_ptr,
    groups_ptr,
    group_heads_ptr,
    order_ptr,
    group_of_ptr,
    rows_ptr,
    tables_ptr,
    lists_ptr,
    num_tiles,
    num_seqs,
    num_q_heads,
    group_size,
    query_head_stride,
    query_token_stride,
    block_shift,
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CODE_KEYS: tl.constexpr,
    ITEMSIZE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr,
    FORMATS: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    COMPENSATED: tl.constexpr,
):
    """Program (KV head in the layer's order, tile of rows), longest tiles first within a head."""
    program = tl.program_id(0)
    kv_head = tl.load(order_ptr + program // num_tiles)
    pair_ptr = lists_ptr + program % num_tiles * 2
    seq = tl.load(pair_ptr)
    tile = tl.load(pair_ptr + 1)
    group = tl.load(group_of_ptr + kv_head * 2)
    page = tl.load(group_heads_ptr + group * GROUP_HEADS_FIELDS + 2)
    page += tl.load(group_of_ptr + kv_head * 2 + 1)
    table_ptr, sink_blocks, gone_blocks, sink_size, window_size = load_table(
        tables_ptr, lists_ptr, group, seq, num_seqs
    )
    first_token = tl.load(rows_ptr + seq * ROWS_FIELDS).to(tl.int64)
    num_new = tl.load(rows_ptr + seq * ROWS_FIELDS + 1)
    context = tl.load(rows_ptr + seq * ROWS_FIELDS + 2)

    rows = tile * ROWS + tl.arange(0, ROWS)
    tokens = rows // group_size
    q_heads = kv_head * group_size + rows % group_size
    t = context - num_new + tokens
    nearest = context - num_new + tile * ROWS // group_size
    farthest = context - num_new + tl.minimum((tile * ROWS + ROWS - 1) // group_size, num_new - 1)

    dims = tl.arange(0, DIM)
    wanted = (tokens < num_new)[:, None] & (dims < HEAD_DIM)[None, :]
    query_offsets = (first_token + tokens) * query_token_stride
    query_offsets += q_heads.to(tl.int64) * query_head_stride
    query = tl.load(query_ptr + query_offsets[:, None] + dims[None, :], mask=wanted, other=0.0)
    if WIDEN:
        query = query.to(tl.float32)

    page_format = load_format(groups_ptr, group)
    has_sums = is_compensated(groups_ptr, group)
    sums_ptr = locate_sums(groups_ptr, group, page, floats_ptr)
    acc, total, largest = attend_pages(
        query, t, nearest, farthest, group, page, page_format, groups_ptr, elements_ptr, bytes_ptr,
        halves_ptr, sums_ptr, has_sums, sink_size, window_size, table_ptr, sink_blocks, gone_blocks,
        block_shift, scale, softcap, FORMATS, HEAD_DIM, DIM, ROWS, KEYS, CODE_KEYS, ITEMSIZE,
        SOFTCAP, NATIVE_FP8, COMPENSATED,
    )  # fmt: skip

    sinks = tl.load(sinks_ptr + q_heads, mask=tokens < num_new, other=0.0)
    total = with_sink(total, largest, sinks)
    out_rows = (first_token + tokens) * num_q_heads + q_heads
    tl.store(
        out_ptr + out_rows[:, None] * HEAD_DIM + dims[None, :],
        (acc / total[:, None]).to(out_ptr.dtype.element_ty),
        mask=wanted,
    )


def prefill_variant(
    dtype: torch.dtype,
    head_dim: int,
    *,
    softcap: bool,
    formats: int,
    capability: tuple[int, int],
    compensated: int = 0,
) -> Variant:
    """The form of the kernel for a cache's dtype, head size and formats, and a device."""
    dim, kind = padded_dim(head_dim), f"*{TRITON_DTYPES[dtype]}"
    tiles = choose_tiles(dtype, dim, softcap, formats, capability)
    return Variant(
        name=f"prefill {TRITON_DTYPES[dtype]} {head_dim}{describe_formats(formats)}"
        f"{' softcap' if softcap else ''}{describe_sums(compensated)}",
        kernel=prefill_kernel,
        types={
            "out_ptr": kind,
            "query_ptr": kind,
            "sinks_ptr": "*fp32",
            "elements_ptr": kind,
            "bytes_ptr": "*u8",
            "halves_ptr": "*fp16",
            "floats_ptr": "*fp32",
            "groups_ptr": "*i64",
            "group_heads_ptr": "*i32",
            "order_ptr": "*i32",
            "group_of_ptr": "*i32",
            "rows_ptr": "*i32",
            "tables_ptr": "*i32",
            "lists_ptr": "*i32",
            "scale": "fp32",
            "softcap": "fp32",
        },
        constants={
            "HEAD_DIM": head_dim,
            "DIM": dim,
            "ROWS": tiles.rows,
            "KEYS": tiles.keys,
            "CODE_KEYS": tiles.code_keys,
            "ITEMSIZE": dtype.itemsize,
            "SOFTCAP": softcap,
            "WIDEN": reads_as_float32(dtype),
            "FORMATS": formats,
            "NATIVE_FP8": has_fp8(capability),
            "COMPENSATED": compensated,
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


@torch.library.custom_op("headlong::prefill_attention", mutates_args={"out"})
def prefill_attention(
    out: torch.Tensor,
    query: torch.Tensor,
    sinks: torch.Tensor,
    arena: torch.Tensor,
    groups: torch.Tensor,
    group_heads: torch.Tensor,
    order: torch.Tensor,
    group_of: torch.Tensor,
    rows: torch.Tensor,
    tables: torch.Tensor,
    lists: torch.Tensor,
    num_tiles: int,
    block_size: int,
    formats: int,
    compensated: int,
    sm_scale: float,
    softcap: float,
) -> None:
    """Attend for the prefill chunks of a step.

    Args:
        out: [total_tokens, num_q_heads, head_dim]; the rows of chunks are written.
        query: [num_q_heads, total_tokens, head_dim] in the cache's dtype.
        sinks: float32 [num_q_heads], learned sink logits; -inf is none.
        arena: uint8 [total_bytes].
        groups: int64 [num_groups, 9].
        group_heads: int32 [num_groups, 4], of the layer.
        order: int32 [num_kv_heads], of the layer.
        group_of: int32 [num_kv_heads, 2], of the layer.
        rows: int32 [num_seqs, 4].
        tables: int32 [num_groups, num_seqs, 8].
        lists: int32 [...], beginning with (sequence, tile) pairs.
        num_tiles: Number of those pairs.
        block_size: Tokens of a page.
        formats: Set of the formats of pages, a bit each.
        compensated: Set of the formats of pages that have sums.
        sm_scale: Factor of the logits.
        softcap: Bound of the logits; 0 is none.
    """
    num_q_heads, _, head_dim = query.shape
    num_kv_heads = order.shape[0]
    variant = prefill_variant(
        query.dtype,
        head_dim,
        softcap=softcap > 0,
        formats=formats,
        capability=device_capability(query.device),
        compensated=compensated,
    )
    variant.launch(
        (num_tiles * num_kv_heads,),
        out,
        query,
        sinks,
        arena.view(query.dtype),
        arena,
        arena.view(torch.float16),
        arena.view(torch.float32),
        groups,
        group_heads,
        order,
        group_of,
        rows,
        tables,
        lists,
        num_tiles,
        rows.shape[0],
        num_q_heads,
        num_q_heads // num_kv_heads,
        query.stride(0),
        query.stride(1),
        block_size.bit_length() - 1,
        sm_scale,
        softcap,
    )


@prefill_attention.register_fake
def _(*arguments: torch.Tensor | int | float) -> None:
    return None
