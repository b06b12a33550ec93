"""Append: K and V of new tokens into the pages of all head groups, in one launch.

What it computes: `reference.append`. RoPE is done by the model before.
"""

import torch
import triton
import triton.language as tl

from headlong.kernels.triton_codes import (
    INT4,
    NUM_FORMATS,
    PLAIN,
    describe_formats,
    quantise_tile,
)
from headlong.kernels.triton_pages import (
    GROUP_HEADS_FIELDS,
    load_format,
    locate_page,
    row_offsets,
    scale_offsets,
)
from headlong.kernels.triton_variant import (
    TRITON_DTYPES,
    Variant,
    padded_dim,
)


@triton.jit
def store_rows(
    section_ptr,
    scales_ptr,
    minima_ptr,
    rows,
    scale_at,
    heads,
    wanted,
    FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """Put rows [rows, DIM] of K or of V into a section of their pages, in the pages' format."""
    if FORMAT == PLAIN:
        codes = heads
    else:
        real = (tl.arange(0, DIM) < HEAD_DIM)[None, :]
        codes, scales, minima = quantise_tile(heads.to(tl.float32), real, FORMAT)
        tl.store(scales_ptr + scale_at, scales, mask=wanted)
        if FORMAT == INT4:
            tl.store(minima_ptr + scale_at, minima, mask=wanted)
            # A byte holds two neighbours, the first one lower.
            low, high = tl.split(tl.reshape(codes, [codes.shape[0], DIM // 2, 2]))
            codes = low | (high << 4)
    halves: tl.constexpr = 2 if FORMAT == INT4 else 1
    columns = tl.arange(0, DIM // halves)
    mask = wanted[:, None] & (columns < HEAD_DIM // halves)[None, :]
    tl.store(section_ptr + rows[:, None] + columns[None, :], codes, mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "block_shift"])
def append_kernel(
    elements_ptr,
    bytes_ptr,
    halves_ptr,
    key_ptr,
    value_ptr,
    slots_ptr,
    groups_ptr,
    group_heads_ptr,
    group_of_ptr,
    num_tokens,
    block_shift,
    key_head_stride,
    key_token_stride,
    value_head_stride,
    value_token_stride,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    ITEMSIZE: tl.constexpr,
    FORMATS: tl.constexpr,
):
    """Program (tile of tokens, KV head); a slot of -1 is no token."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    kv_head = tl.program_id(1).to(tl.int64)
    group = tl.load(group_of_ptr + kv_head * 2)
    page = tl.load(group_heads_ptr + group * GROUP_HEADS_FIELDS + 2)
    page += tl.load(group_of_ptr + kv_head * 2 + 1)
    page_format = load_format(groups_ptr, group)

    slots = tl.load(slots_ptr + group * num_tokens + tokens, mask=tokens < num_tokens, other=-1)
    wanted = slots >= 0
    dims = tl.arange(0, DIM)
    mask = wanted[:, None] & (dims < HEAD_DIM)[None, :]
    sources = tokens.to(tl.int64)[:, None]
    keys = tl.load(
        key_ptr + sources * key_token_stride + kv_head * key_head_stride + dims[None, :], mask=mask
    )
    values = tl.load(
        value_ptr + sources * value_token_stride + kv_head * value_head_stride + dims[None, :],
        mask=mask,
    )
    for form in tl.static_range(NUM_FORMATS):
        if FORMATS >> form & 1:
            is_here = (page_format == form) | (1 << form == FORMATS)
            if is_here:
                keys_ptr, values_ptr, scales_ptr, minima_ptr, block_units = locate_page(
                    groups_ptr, group, page, elements_ptr, bytes_ptr, halves_ptr, form, ITEMSIZE
                )
                rows = row_offsets(
                    slots >> block_shift, slots, block_units, block_shift, form, HEAD_DIM,
                    ITEMSIZE,
                )  # fmt: skip
                scale_at = scale_offsets(slots >> block_shift, slots, block_units, block_shift)
                store_rows(
                    keys_ptr, scales_ptr, minima_ptr, rows, scale_at, keys, wanted, form,
                    HEAD_DIM, DIM,
                )  # fmt: skip
                scale_at += 1 << block_shift
                store_rows(
                    values_ptr, scales_ptr, minima_ptr, rows, scale_at, values, wanted, form,
                    HEAD_DIM, DIM,
                )  # fmt: skip


def append_variant(dtype: torch.dtype, head_dim: int, formats: int) -> Variant:
    """The form of the kernel for a cache's dtype, head size and formats."""
    dim, kind = padded_dim(head_dim), f"*{TRITON_DTYPES[dtype]}"
    return Variant(
        name=f"append {TRITON_DTYPES[dtype]} {head_dim}{describe_formats(formats)}",
        kernel=append_kernel,
        types={
            "elements_ptr": kind,
            "bytes_ptr": "*u8",
            "halves_ptr": "*fp16",
            "key_ptr": kind,
            "value_ptr": kind,
            "slots_ptr": "*i32",
            "groups_ptr": "*i64",
            "group_heads_ptr": "*i32",
            "group_of_ptr": "*i32",
        },
        constants={
            "HEAD_DIM": head_dim,
            "DIM": dim,
            "TOKENS": max(1, 4096 // dim // dtype.itemsize),
            "ITEMSIZE": dtype.itemsize,
            "FORMATS": formats,
        },
        num_warps=4,
        num_stages=1,
    )


@torch.library.custom_op("headlong::append_kv", mutates_args={"arena"})
def append_kv(
    arena: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    groups: torch.Tensor,
    group_heads: torch.Tensor,
    group_of: torch.Tensor,
    block_size: int,
    formats: int,
) -> None:
    """Write K and V into their slots.

    Args:
        arena: uint8 [total_bytes], changed in place.
        key: [num_kv_heads, total_tokens, head_dim] in the cache's dtype, any strides but the last.
        value: As `key`.
        slots: int32 [num_groups, total_tokens], block * block_size + offset; -1 writes nothing.
        groups: int64 [num_groups, 9].
        group_heads: int32 [num_groups, 4], of the layer.
        group_of: int32 [num_kv_heads, 2], of the layer.
        block_size: Tokens of a page.
        formats: Set of the formats of pages, a bit each.
    """
    num_kv_heads, num_tokens, head_dim = key.shape
    variant = append_variant(key.dtype, head_dim, formats)
    tile = variant.constants["TOKENS"]
    assert isinstance(tile, int)
    variant.launch(
        (triton.cdiv(num_tokens, tile), num_kv_heads),
        arena.view(key.dtype),
        arena,
        arena.view(torch.float16),
        key,
        value,
        slots,
        groups,
        group_heads,
        group_of,
        num_tokens,
        block_size.bit_length() - 1,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
    )


@append_kv.register_fake
def _(
    arena: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    groups: torch.Tensor,
    group_heads: torch.Tensor,
    group_of: torch.Tensor,
    block_size: int,
    formats: int,
) -> None:
    return None
