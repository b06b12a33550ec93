"""Bounds: least and greatest key of the pages that got tokens, and of their spans so far.

What it computes: the bounds of `reference_summaries.summarise`, from what pages hold.
"""

import torch
import triton
import triton.language as tl

from headlong.kernels.layout import SPAN_BLOCKS
from headlong.kernels.triton_pages import (
    GROUP_HEADS_FIELDS,
    ROWS_FIELDS,
    UNIT,
    load_table,
    locate_page,
)
from headlong.kernels.triton_rows import (
    BOUNDS_FIELD,
    load_block,
    load_rows,
    locate_section,
    summary_variant,
)
from headlong.kernels.triton_variant import Variant, device_capability

SPAN = tl.constexpr(SPAN_BLOCKS)


@triton.jit(do_not_specialize=["group", "num_seqs", "block_shift"])
def bounds_kernel(
    elements_ptr,
    bytes_ptr,
    halves_ptr,
    groups_ptr,
    group_heads_ptr,
    rows_ptr,
    tables_ptr,
    lists_ptr,
    group,
    num_seqs,
    block_shift,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    ITEMSIZE: tl.constexpr,
    FORMAT: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    """Program (sequence, span, head) takes the blocks of its span that got tokens, in order."""
    seq = tl.program_id(0)
    head = tl.program_id(2)
    num_new = tl.load(rows_ptr + seq * ROWS_FIELDS + 1)
    context = tl.load(rows_ptr + seq * ROWS_FIELDS + 2)
    first_touched = tl.maximum(context - num_new, 0) >> block_shift
    span = first_touched // SPAN + tl.program_id(1)
    first = tl.maximum(first_touched, span * SPAN)
    end = tl.minimum((context + (1 << block_shift) - 1) >> block_shift, (span + 1) * SPAN)
    if first < end:
        page = tl.load(group_heads_ptr + group * GROUP_HEADS_FIELDS + 2) + head
        units = locate_section(groups_ptr, group, page, BOUNDS_FIELD)
        table_ptr, sink_blocks, gone_blocks, _, _ = load_table(
            tables_ptr, lists_ptr, group, seq, num_seqs
        )
        keys_ptr, _, scales_ptr, minima_ptr, block_units = locate_page(
            groups_ptr, group, page, elements_ptr, bytes_ptr, halves_ptr, FORMAT, ITEMSIZE
        )
        bounds_ptr = elements_ptr + units * (UNIT // ITEMSIZE)
        block_elements = block_units * (UNIT // ITEMSIZE)
        dims = tl.arange(0, DIM)
        real = dims < HEAD_DIM

        goes_on = real & (first % SPAN > 0)
        before = load_block(first - 1, table_ptr, sink_blocks, gone_blocks)
        before_ptr = bounds_ptr + before.to(tl.int64) * block_elements + dims
        span_least = tl.load(before_ptr + 2 * HEAD_DIM, mask=goes_on, other=float("inf"))
        span_greatest = tl.load(before_ptr + 3 * HEAD_DIM, mask=goes_on, other=float("-inf"))
        span_least = span_least.to(tl.float32)
        span_greatest = span_greatest.to(tl.float32)
        for logical in range(first, end):
            block = load_block(logical, table_ptr, sink_blocks, gone_blocks)
            least = tl.full([DIM], float("inf"), tl.float32)
            greatest = tl.full([DIM], float("-inf"), tl.float32)
            last_token = tl.minimum((logical + 1) << block_shift, context)
            for token in range(logical << block_shift, last_token, TOKENS):
                positions = token + tl.arange(0, TOKENS)
                read = positions < last_token
                keys = load_rows(
                    keys_ptr, scales_ptr, minima_ptr, block, positions, read, block_units,
                    block_shift, FORMAT, HEAD_DIM, DIM, ITEMSIZE, NATIVE_FP8,
                )  # fmt: skip
                lows = tl.where(read[:, None], keys, float("inf"))
                highs = tl.where(read[:, None], keys, float("-inf"))
                least = tl.minimum(least, tl.min(lows, 0))
                greatest = tl.maximum(greatest, tl.max(highs, 0))
            span_least = tl.minimum(span_least, least)
            span_greatest = tl.maximum(span_greatest, greatest)
            own_ptr = bounds_ptr + block.to(tl.int64) * block_elements + dims
            dtype = elements_ptr.dtype.element_ty
            tl.store(own_ptr, least.to(dtype), mask=real)
            tl.store(own_ptr + HEAD_DIM, greatest.to(dtype), mask=real)
            tl.store(own_ptr + 2 * HEAD_DIM, span_least.to(dtype), mask=real)
            tl.store(own_ptr + 3 * HEAD_DIM, span_greatest.to(dtype), mask=real)


def bounds_variant(
    dtype: torch.dtype, head_dim: int, form: int, capability: tuple[int, int]
) -> Variant:
    """The form of the kernel for a cache's dtype and head size, and a group's format."""
    return summary_variant("bounds", bounds_kernel, dtype, head_dim, form, capability)


@torch.library.custom_op("headlong::update_bounds", mutates_args={"arena"})
def update_bounds(
    arena: torch.Tensor,
    groups: torch.Tensor,
    group_heads: torch.Tensor,
    rows: torch.Tensor,
    tables: torch.Tensor,
    lists: torch.Tensor,
    group: int,
    num_heads: int,
    num_spans: int,
    dtype: torch.dtype,
    head_dim: int,
    block_size: int,
    form: int,
) -> None:
    """Bring bounds up to date.

    Args:
        arena: uint8 [total_bytes], changed in place.
        groups: int64 [num_groups, 9].
        group_heads: int32 [num_groups, 4], of the layer.
        rows: int32 [num_seqs, 4].
        tables: int32 [num_groups, num_seqs, 8].
        lists: int32 [...].
        group: Whose pages.
        num_heads: Heads of the layer in the group.
        num_spans: Most spans of any sequence that got tokens.
        dtype: Of elements and bounds.
        head_dim: Elements.
        block_size: Tokens of a page.
        form: Number of the pages' format.
    """
    variant = bounds_variant(dtype, head_dim, form, device_capability(arena.device))
    variant.launch(
        (rows.shape[0], num_spans, num_heads),
        arena.view(dtype),
        arena,
        arena.view(torch.float16),
        groups,
        group_heads,
        rows,
        tables,
        lists,
        group,
        rows.shape[0],
        block_size.bit_length() - 1,
    )


@update_bounds.register_fake
def _(*arguments: torch.Tensor | torch.dtype | int) -> None:
    return None
