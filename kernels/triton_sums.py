"""Sums: of all keys and values from the sinks' end to the beginning of the pages that begin.

What it computes: the sums of `reference_summaries.summarise`, from what pages hold, in float32. A
sequence's pages are taken in order, one by one: so sums do not depend on how many begin at once.
"""

import torch
import triton
import triton.language as tl

from headlong.kernels.triton_pages import (
    GROUP_HEADS_FIELDS,
    ROWS_FIELDS,
    UNIT,
    load_table,
    locate_page,
)
from headlong.kernels.triton_rows import (
    SUMS_FIELD,
    load_block,
    load_rows,
    locate_section,
    summary_variant,
)
from headlong.kernels.triton_variant import Variant, device_capability


@triton.jit(do_not_specialize=["group", "num_seqs", "block_shift"])
def sums_kernel(
    elements_ptr,
    bytes_ptr,
    halves_ptr,
    floats_ptr,
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
    """Program (sequence, head, K or V) takes the blocks that got their first token, in order."""
    seq = tl.program_id(0)
    head = tl.program_id(1)
    which = tl.program_id(2)
    num_new = tl.load(rows_ptr + seq * ROWS_FIELDS + 1)
    context = tl.load(rows_ptr + seq * ROWS_FIELDS + 2)
    round_up = (1 << block_shift) - 1
    first = (tl.maximum(context - num_new, 0) + round_up) >> block_shift
    end = (context + round_up) >> block_shift
    if first < end:
        page = tl.load(group_heads_ptr + group * GROUP_HEADS_FIELDS + 2) + head
        units = locate_section(groups_ptr, group, page, SUMS_FIELD)
        table_ptr, sink_blocks, gone_blocks, sink_size, _ = load_table(
            tables_ptr, lists_ptr, group, seq, num_seqs
        )
        keys_ptr, values_ptr, scales_ptr, minima_ptr, block_units = locate_page(
            groups_ptr, group, page, elements_ptr, bytes_ptr, halves_ptr, FORMAT, ITEMSIZE
        )
        section_ptr = tl.where(which == 0, keys_ptr, values_ptr)
        scales_ptr += which << block_shift
        minima_ptr += which << block_shift
        dims = tl.arange(0, DIM)
        real = dims < HEAD_DIM
        sums_ptr = floats_ptr + units * (UNIT // 4) + which * HEAD_DIM + dims
        block_floats = block_units * (UNIT // 4)

        before = load_block(first - 1, table_ptr, sink_blocks, gone_blocks)
        running = tl.load(
            sums_ptr + before.to(tl.int64) * block_floats, mask=real & (first > 0), other=0.0
        )
        for logical in range(first, end):
            block = load_block(logical, table_ptr, sink_blocks, gone_blocks)
            # What is before the first block is before the sinks' end, too, and not read.
            own = tl.zeros([DIM], tl.float32)
            for token in range((logical - 1) << block_shift, logical << block_shift, TOKENS):
                positions = token + tl.arange(0, TOKENS)
                read = (positions >= sink_size) & (positions < logical << block_shift)
                own += tl.sum(
                    load_rows(
                        section_ptr, scales_ptr, minima_ptr, before, positions, read, block_units,
                        block_shift, FORMAT, HEAD_DIM, DIM, ITEMSIZE, NATIVE_FP8,
                    ),
                    0,
                )  # fmt: skip
            running += own
            tl.store(sums_ptr + block.to(tl.int64) * block_floats, running, mask=real)
            before = block


def sums_variant(
    dtype: torch.dtype, head_dim: int, form: int, capability: tuple[int, int]
) -> Variant:
    """The form of the kernel for a cache's dtype and head size, and a group's format."""
    return summary_variant("sums", sums_kernel, dtype, head_dim, form, capability)


@torch.library.custom_op("headlong::update_sums", mutates_args={"arena"})
def update_sums(
    arena: torch.Tensor,
    groups: torch.Tensor,
    group_heads: torch.Tensor,
    rows: torch.Tensor,
    tables: torch.Tensor,
    lists: torch.Tensor,
    group: int,
    num_heads: int,
    dtype: torch.dtype,
    head_dim: int,
    block_size: int,
    form: int,
) -> None:
    """Write the sums of pages that got their first token.

    Args:
        arena: uint8 [total_bytes], changed in place.
        groups: int64 [num_groups, 9].
        group_heads: int32 [num_groups, 4], of the layer.
        rows: int32 [num_seqs, 4].
        tables: int32 [num_groups, num_seqs, 8].
        lists: int32 [...].
        group: Whose pages.
        num_heads: Heads of the layer in the group.
        dtype: Of elements that are not quantised.
        head_dim: Elements.
        block_size: Tokens of a page.
        form: Number of the pages' format.
    """
    variant = sums_variant(dtype, head_dim, form, device_capability(arena.device))
    variant.launch(
        (rows.shape[0], num_heads, 2),
        arena.view(dtype),
        arena,
        arena.view(torch.float16),
        arena.view(torch.float32),
        groups,
        group_heads,
        rows,
        tables,
        lists,
        group,
        rows.shape[0],
        block_size.bit_length() - 1,
    )


@update_sums.register_fake
def _(*arguments: torch.Tensor | torch.dtype | int) -> None:
    return None
