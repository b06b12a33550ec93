"""Decode: one new token a sequence against its paged keys, all heads of a layer in one launch.

What it computes: `reference.attend`, for the sequences with one new token. The keys that a KV head
sees are cut into splits of a fixed number of keys, counted from the sequence's own first key; a
streaming head has a few whatever the context. Persistent programs share the splits of all heads and
sequences out among themselves, so the grid depends on the device alone and fits a CUDA graph. A
head with one split writes its result; of several, `triton_merge` weighs the parts. So a sequence's
result depends on nothing but the sequence.

The query heads of a KV head are the rows of a tile: K and V are read once for all of them.
"""

import torch
import triton
import triton.language as tl

from headlong.kernels.triton_choice import CHOICES_FIELDS
from headlong.kernels.triton_codes import NUM_FORMATS, PLAIN, describe_formats
from headlong.kernels.triton_compensation import describe_sums, is_compensated, locate_sums
from headlong.kernels.triton_merge import PART, ROWS, merge_variant
from headlong.kernels.triton_pages import (
    GROUP_HEADS_FIELDS,
    ROWS_FIELDS,
    TABLES_FIELDS,
    load_format,
    load_table,
    locate_page,
    with_sink,
)
from headlong.kernels.triton_plan import KEY_ALIGNMENT, SPLIT_KEYS
from headlong.kernels.triton_split import attend_split
from headlong.kernels.triton_tiles import PLAIN_ONLY
from headlong.kernels.triton_variant import (
    TRITON_DTYPES,
    Variant,
    device_capability,
    has_fp8,
    padded_dim,
    reads_as_float32,
)

REGISTERS = 128
"""Most registers of a thread: four programs of four warps share a multiprocessor's 65536."""


@triton.jit(
    do_not_specialize=[
        "num_seqs",
        "num_groups",
        "num_q_heads",
        "group_size",
        "block_shift",
        "partial_rows",
        "chosen_group",
        "chosen_pages",
    ]
)
def decode_kernel(
    out_ptr,
    partial_ptr,
    lse_ptr,
    query_ptr,
    sinks_ptr,
    elements_ptr,
    bytes_ptr,
    halves_ptr,
    floats_ptr,
    groups_ptr,
    group_heads_ptr,
    order_ptr,
    rows_ptr,
    tables_ptr,
    splits_ptr,
    lists_ptr,
    choices_ptr,
    chosen_ptr,
    num_seqs,
    num_groups,
    num_q_heads,
    group_size,
    query_head_stride,
    query_token_stride,
    block_shift,
    partial_rows,
    chosen_group,
    chosen_pages,
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CODE_KEYS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    KEY_ALIGNMENT: tl.constexpr,
    ITEMSIZE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr,
    FORMATS: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    CHOOSES: tl.constexpr,
    COMPENSATED: tl.constexpr,
):
    """Program p takes items p, p + programs, ...; an item is (group, split, tile of rows, head)."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    row_tiles = tl.cdiv(group_size, ROWS)
    dims = tl.arange(0, DIM)
    items_before = 0
    for group in range(num_groups):
        heads_ptr = group_heads_ptr + group * GROUP_HEADS_FIELDS
        num_heads = tl.load(heads_ptr)
        page_format = load_format(groups_ptr, group)
        has_sums = is_compensated(groups_ptr, group)
        pairs_ptr = lists_ptr + tl.load(splits_ptr + group * 2 + 1)
        num_items = tl.load(splits_ptr + group * 2) * row_tiles * num_heads
        # The round goes on where the last group's ended.
        first_item = (program + programs - items_before % programs) % programs
        # With compensation, registers are short: what only threads differ in, addresses in shared
        # memory above all, is then found anew for each item, not kept from item to item.
        for item in tl.range(first_item, num_items, programs, disable_licm=COMPENSATED != 0):
            head = item % num_heads
            row_tile = item // num_heads % row_tiles
            pair_ptr = pairs_ptr + item // num_heads // row_tiles * 2
            seq = tl.load(pair_ptr)
            kv_head = tl.load(order_ptr + tl.load(heads_ptr + 1) + head)
            page = tl.load(heads_ptr + 2) + head
            table_ptr, sink_blocks, gone_blocks, sink_size, window_size = load_table(
                tables_ptr, lists_ptr, group, seq, num_seqs
            )
            num_splits = tl.load(tables_ptr + (group * num_seqs + seq) * TABLES_FIELDS + 6)
            token = tl.load(rows_ptr + seq * ROWS_FIELDS).to(tl.int64)
            context = tl.load(rows_ptr + seq * ROWS_FIELDS + 2)
            if CHOOSES:
                read_pages = tl.load(choices_ptr + seq * CHOICES_FIELDS)
                if (group == chosen_group) & (read_pages > 0):
                    # Chosen pages make a shorter context: all of them are full but the newest.
                    num_pages = (context + (1 << block_shift) - 1) >> block_shift
                    context -= (num_pages - read_pages) << block_shift
                    table_ptr = chosen_ptr + (seq * num_heads + head).to(tl.int64) * chosen_pages

            rows = row_tile * ROWS + tl.arange(0, ROWS)
            q_heads = kv_head * group_size + rows
            wanted = (rows < group_size)[:, None] & (dims < HEAD_DIM)[None, :]
            query_rows = token * query_token_stride + q_heads.to(tl.int64) * query_head_stride
            query = tl.load(query_ptr + query_rows[:, None] + dims[None, :], mask=wanted, other=0.0)
            if WIDEN:
                query = query.to(tl.float32)
            split = tl.load(pair_ptr + 1)
            sums_ptr = locate_sums(groups_ptr, group, page, floats_ptr)
            acc = tl.zeros([ROWS, DIM], tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            largest = tl.zeros([ROWS], tl.float32)
            for form in tl.static_range(NUM_FORMATS):
                if FORMATS >> form & 1:
                    is_here = (page_format == form) | (1 << form == FORMATS)
                    if is_here:
                        keys_ptr, values_ptr, scales_ptr, minima_ptr, block_units = locate_page(
                            groups_ptr, group, page, elements_ptr, bytes_ptr, halves_ptr, form,
                            ITEMSIZE,
                        )  # fmt: skip
                        acc, total, largest = attend_split(
                            query, context, split, table_ptr, sink_blocks, gone_blocks, sink_size,
                            window_size, keys_ptr, values_ptr, scales_ptr, minima_ptr, sums_ptr,
                            has_sums, block_units, block_shift, scale, softcap, form, HEAD_DIM,
                            DIM, ROWS, KEYS if form == PLAIN else CODE_KEYS, SPLIT_KEYS,
                            KEY_ALIGNMENT, ITEMSIZE, SOFTCAP, NATIVE_FP8, COMPENSATED,
                        )  # fmt: skip

            if num_splits == 1:
                sinks = tl.load(sinks_ptr + q_heads, mask=rows < group_size, other=0.0)
                total = with_sink(total, largest, sinks)
                out_rows = token * num_q_heads + q_heads
                tl.store(
                    out_ptr + out_rows[:, None] * HEAD_DIM + dims[None, :],
                    (acc / total[:, None]).to(out_ptr.dtype.element_ty),
                    mask=wanted,
                )
            else:
                # An empty split weighs nothing: its log-sum-exp is -inf and its result 0.
                bound = tl.where(largest == float("-inf"), 0.0, largest)
                some = tl.where(total == 0.0, 1.0, total)
                part_rows = tl.cast(items_before + item, tl.int64) * partial_rows
                part_rows += tl.arange(0, ROWS)
                tl.store(lse_ptr + part_rows, bound + tl.log2(total), mask=rows < group_size)
                tl.store(
                    partial_ptr + part_rows[:, None] * HEAD_DIM + dims[None, :],
                    acc / some[:, None],
                    mask=wanted,
                )
        items_before += num_items


def decode_variant(
    dtype: torch.dtype,
    head_dim: int,
    *,
    softcap: bool,
    formats: int,
    capability: tuple[int, int],
    chooses: bool = False,
    compensated: int = 0,
) -> Variant:
    """The form of the decode kernel for a cache's dtype, head size and formats, and a device."""
    dim, kind = padded_dim(head_dim), f"*{TRITON_DTYPES[dtype]}"
    # What codes are turned into takes registers, which the loops of several formats share.
    several = (formats & ~PLAIN_ONLY).bit_count() > 1
    code_elements = 1 << (11 if several else 12)
    return Variant(
        name=f"decode {TRITON_DTYPES[dtype]} {head_dim}{describe_formats(formats)}"
        f"{' softcap' if softcap else ''}{' choosing' if chooses else ''}"
        f"{describe_sums(compensated)}",
        kernel=decode_kernel,
        types={
            "out_ptr": kind,
            "partial_ptr": "*fp32",
            "lse_ptr": "*fp32",
            "query_ptr": kind,
            "sinks_ptr": "*fp32",
            "elements_ptr": kind,
            "bytes_ptr": "*u8",
            "halves_ptr": "*fp16",
            "floats_ptr": "*fp32",
            "groups_ptr": "*i64",
            "group_heads_ptr": "*i32",
            "order_ptr": "*i32",
            "rows_ptr": "*i32",
            "tables_ptr": "*i32",
            "splits_ptr": "*i32",
            "lists_ptr": "*i32",
            "choices_ptr": "*i32",
            "chosen_ptr": "*i32",
            "scale": "fp32",
            "softcap": "fp32",
        },
        constants={
            "HEAD_DIM": head_dim,
            "DIM": dim,
            "ROWS": ROWS,
            # 8 KiB of K, and as much of V, for each stage of the pipeline: four programs fit.
            "KEYS": max(16, min(KEY_ALIGNMENT, (1 << 13) // (dim * dtype.itemsize))),
            "CODE_KEYS": max(16, min(KEY_ALIGNMENT, code_elements // dim)),
            "SPLIT_KEYS": SPLIT_KEYS,
            "KEY_ALIGNMENT": KEY_ALIGNMENT,
            "ITEMSIZE": dtype.itemsize,
            "SOFTCAP": softcap,
            "WIDEN": reads_as_float32(dtype),
            "FORMATS": formats,
            "NATIVE_FP8": has_fp8(capability),
            "CHOOSES": chooses,
            "COMPENSATED": compensated,
        },
        num_warps=4,
        num_stages=3,
        max_registers=REGISTERS if dtype.itemsize == 2 and dim <= 128 else None,
    )


@torch.library.custom_op("headlong::decode_attention", mutates_args={"out", "partial", "lse"})
def decode_attention(
    out: torch.Tensor,
    partial: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    sinks: torch.Tensor,
    arena: torch.Tensor,
    groups: torch.Tensor,
    group_heads: torch.Tensor,
    order: torch.Tensor,
    group_of: torch.Tensor,
    rows: torch.Tensor,
    tables: torch.Tensor,
    splits: torch.Tensor,
    lists: torch.Tensor,
    choices: torch.Tensor,
    chosen: torch.Tensor,
    chosen_group: int,
    num_decodes: int,
    num_programs: int,
    block_size: int,
    formats: int,
    compensated: int,
    sm_scale: float,
    softcap: float,
) -> None:
    """Attend for the first `num_decodes` sequences of a step.

    Args:
        out: [total_tokens, num_q_heads, head_dim]; the rows of decodes are written.
        partial: float32 [items, min(16, group size), head_dim], written where there are splits.
        lse: float32 [items, min(16, group size)], likewise, base 2.
        query: [num_q_heads, total_tokens, head_dim] in the cache's dtype.
        sinks: float32 [num_q_heads], learned sink logits; -inf is none.
        arena: uint8 [total_bytes].
        groups: int64 [num_groups, 9].
        group_heads: int32 [num_groups, 4], of the layer.
        order: int32 [num_kv_heads], of the layer.
        group_of: int32 [num_kv_heads, 2], of the layer.
        rows: int32 [num_seqs, 4].
        tables: int32 [num_groups, num_seqs, 8].
        splits: int32 [num_groups, 2].
        lists: int32 [...].
        choices: int32 [num_seqs, 4].
        chosen: int32 [num_decodes, heads, pages], blocks that heads of the chosen group read; empty
            if all read all.
        chosen_group: Whose pages are chosen.
        num_decodes: Sequences with one new token, the first ones.
        num_programs: Programs that share the work.
        block_size: Tokens of a page.
        formats: Set of the formats of pages, a bit each.
        compensated: Set of the formats of pages that have sums.
        sm_scale: Factor of the logits.
        softcap: Bound of the logits; 0 is none.
    """
    num_q_heads, _, head_dim = query.shape
    group_size = num_q_heads // order.shape[0]
    decode_variant(
        query.dtype,
        head_dim,
        softcap=softcap > 0,
        formats=formats,
        capability=device_capability(query.device),
        chooses=chosen.numel() > 0,
        compensated=compensated,
    ).launch(
        (num_programs,),
        out,
        partial,
        lse,
        query,
        sinks,
        arena.view(query.dtype),
        arena,
        arena.view(torch.float16),
        arena.view(torch.float32),
        groups,
        group_heads,
        order,
        rows,
        tables,
        splits,
        lists,
        choices,
        chosen,
        rows.shape[0],
        groups.shape[0],
        num_q_heads,
        group_size,
        query.stride(0),
        query.stride(1),
        block_size.bit_length() - 1,
        partial.shape[1],
        chosen_group,
        chosen.shape[2],
        sm_scale,
        softcap,
    )
    merge_variant(query.dtype, head_dim).launch(
        (num_decodes, num_q_heads, triton.cdiv(head_dim, PART)),
        out,
        partial,
        lse,
        sinks,
        group_heads,
        group_of,
        rows,
        tables,
        splits,
        rows.shape[0],
        num_q_heads,
        group_size,
        partial.shape[1],
    )


@decode_attention.register_fake
def _(*arguments: torch.Tensor | int | float) -> None:
    return None
