"""Tokens of one page as numbers, for what pages say of their keys: see `triton_summaries`."""

import torch
import triton
import triton.language as tl

from headlong.kernels.triton_codes import INT4, PLAIN, describe_formats, load_tile
from headlong.kernels.triton_pages import GROUPS_FIELDS, row_offsets, scale_offsets
from headlong.kernels.triton_variant import TRITON_DTYPES, Variant, has_fp8, padded_dim

BOUNDS_FIELD = tl.constexpr(5)
SUMS_FIELD = tl.constexpr(6)


@triton.jit
def locate_section(groups_ptr, group, page, field: tl.constexpr):
    """Units from the start of the arena to a section of a head's page in block 0."""
    fields_ptr = groups_ptr + group * GROUPS_FIELDS
    base = tl.load(fields_ptr) + page.to(tl.int64) * tl.load(fields_ptr + 1)
    return base + tl.load(fields_ptr + field)


@triton.jit
def load_block(logical, table_ptr, sink_blocks, gone_blocks):
    """The block at a logical index; 0 if that is negative."""
    entry = tl.where(logical < sink_blocks, logical, logical - gone_blocks)
    return tl.load(table_ptr + entry, mask=logical >= 0, other=0)


@triton.jit
def load_rows(
    section_ptr,
    scales_ptr,
    minima_ptr,
    block,
    positions,
    read,
    block_units,
    block_shift,
    FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ITEMSIZE: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    """K or V of tokens as their page holds it, float32 [tokens, DIM]; 0 of those not to be read."""
    rows = row_offsets(block, positions, block_units, block_shift, FORMAT, HEAD_DIM, ITEMSIZE)
    tile = load_tile(
        section_ptr, rows, read, 1, FORMAT, HEAD_DIM, DIM, True, NATIVE_FP8, tl.float32
    )
    if FORMAT != PLAIN:
        scale_at = scale_offsets(block, positions, block_units, block_shift)
        tile *= tl.load(scales_ptr + scale_at, mask=read, other=0.0).to(tl.float32)[:, None]
        if FORMAT == INT4:
            minima = tl.load(minima_ptr + scale_at, mask=read, other=0.0)
            tile += minima.to(tl.float32)[:, None]
    return tile


def summary_variant(
    name: str,
    kernel: object,
    dtype: torch.dtype,
    head_dim: int,
    form: int,
    capability: tuple[int, int],
) -> Variant:
    """The form of a kernel of summaries for a cache's dtype and head size, and a group's format."""
    dim = padded_dim(head_dim)
    return Variant(
        name=f"{name} {TRITON_DTYPES[dtype]} {head_dim}{describe_formats(1 << form)}",
        kernel=kernel,
        types={
            "elements_ptr": f"*{TRITON_DTYPES[dtype]}",
            "bytes_ptr": "*u8",
            "halves_ptr": "*fp16",
            **({"floats_ptr": "*fp32"} if name == "sums" else {}),
            "groups_ptr": "*i64",
            "group_heads_ptr": "*i32",
            "rows_ptr": "*i32",
            "tables_ptr": "*i32",
            "lists_ptr": "*i32",
        },
        constants={
            "HEAD_DIM": head_dim,
            "DIM": dim,
            "TOKENS": max(8, min(64, 2048 // dim)),
            "ITEMSIZE": dtype.itemsize,
            "FORMAT": form,
            "NATIVE_FP8": has_fp8(capability),
        },
        num_warps=4,
        num_stages=2,
    )
