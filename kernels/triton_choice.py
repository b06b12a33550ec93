"""The kernels of page selection: what a page may be worth to a query, and the best of many.

What they compute: `reference_selection.chosen_pages`, a program for each sequence and KV head. A
sequence that reads all, and a head that keeps its choice, end their programs at once, so the same
launches serve every step. `triton_selection` launches them.

    choices      [num_seqs, 4]                 pages that are read, 0 for all; place; renews
    anew         [num_seqs, num_heads]         whether a head chooses in this step
    keys         [num_seqs, num_heads, ...]    scores as integers of the same order
    spans        [num_seqs, num_heads, ...]    spans whose pages are scored, ascending
    remembered   [num_places, num_heads, ...]  pages chosen, without those that are always read
    queries      [num_places, num_heads, group_size, head_dim]    what they were chosen for
"""

from typing import Any

import torch
import triton
import triton.language as tl

from headlong.kernels.layout import SECTION_ALIGNMENT_BYTES, SPAN_BLOCKS
from headlong.kernels.reference_selection import (
    FEWEST_SPANS,
    FIRST_PAGES,
    NEWEST_PAGES,
    SPAN_FACTOR,
)
from headlong.kernels.triton_pages import ROWS_FIELDS, TABLES_FIELDS
from headlong.kernels.triton_variant import TRITON_DTYPES, Variant, padded_dim

CHOICES_FIELDS = tl.constexpr(4)
LEFT_OUT = tl.constexpr(-(2**31))
GREATEST = tl.constexpr(2**31 - 1)
SPAN = tl.constexpr(SPAN_BLOCKS)
FIRST = tl.constexpr(FIRST_PAGES)
NEWEST = tl.constexpr(NEWEST_PAGES)
FEWEST = tl.constexpr(FEWEST_SPANS)
FACTOR = tl.constexpr(SPAN_FACTOR)

KEYS_TILE = 1024
"""Keys that a program compares at a time."""

TILE_ELEMENTS = 1 << 11
"""Elements of each of the two bounds that a program scores at a time."""


@triton.jit
def spans_looked_at(budget_pages):
    """Most spans whose pages are scored one by one; see `num_spans_looked_at`."""
    return tl.maximum(FEWEST, tl.cdiv(budget_pages * FACTOR, SPAN))


@triton.jit
def ordered_key(scores):
    """Integers in the order of the scores, above LEFT_OUT; 0.0 and -0.0 are equals."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), LEFT_OUT + 1)


@triton.jit(do_not_specialize=["num_heads", "first_head", "group_size"])
def drift_kernel(
    anew_ptr,
    queries_ptr,
    query_ptr,
    order_ptr,
    rows_ptr,
    choices_ptr,
    num_heads,
    first_head,
    group_size,
    query_head_stride,
    query_token_stride,
    min_similarity,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """Program (sequence, head): does it choose anew, and for which queries was that?"""
    seq = tl.program_id(0)
    head = tl.program_id(1)
    if tl.load(choices_ptr + seq * CHOICES_FIELDS) == 0:
        return
    dims = tl.arange(0, DIM)
    real = dims < HEAD_DIM
    token = tl.load(rows_ptr + seq * ROWS_FIELDS).to(tl.int64)
    first_q_head = tl.load(order_ptr + first_head + head) * group_size
    query_ptr += token * query_token_stride + first_q_head.to(tl.int64) * query_head_stride
    place = tl.load(choices_ptr + seq * CHOICES_FIELDS + 1).to(tl.int64)
    queries_ptr += (place * num_heads + head) * group_size * HEAD_DIM
    anew = tl.load(choices_ptr + seq * CHOICES_FIELDS + 2)
    for row in range(group_size):
        query = tl.load(query_ptr + row * query_head_stride + dims, mask=real, other=0.0)
        before = tl.load(queries_ptr + row * HEAD_DIM + dims, mask=real, other=0.0)
        query, before = query.to(tl.float32), before.to(tl.float32)
        lengths = tl.sqrt(tl.sum(query * query, 0)) * tl.sqrt(tl.sum(before * before, 0))
        similarity = tl.sum(query * before, 0) / tl.maximum(lengths, 1e-16)
        anew = tl.where(similarity < min_similarity, 1, anew)
    tl.store(anew_ptr + seq * num_heads + head, anew)
    if anew != 0:
        for row in range(group_size):
            query = tl.load(query_ptr + row * query_head_stride + dims, mask=real, other=0.0)
            tl.store(queries_ptr + row * HEAD_DIM + dims, query, mask=real)


@triton.jit(
    do_not_specialize=[
        "anew_seq_step",
        "anew_head_step",
        "num_heads",
        "first_head",
        "first_page",
        "group_size",
        "block_shift",
        "block_units",
        "page_units",
        "bounds_units",
        "most_keys",
        "most_spans",
    ]
)
def score_kernel(
    keys_ptr,
    spans_ptr,
    query_ptr,
    region_ptr,
    order_ptr,
    rows_ptr,
    choices_ptr,
    anew_ptr,
    tables_ptr,
    lists_ptr,
    anew_seq_step,
    anew_head_step,
    num_heads,
    first_head,
    first_page,
    group_size,
    query_head_stride,
    query_token_stride,
    block_shift,
    block_units,
    page_units,
    bounds_units,
    most_keys,
    most_spans,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    PAGES: tl.constexpr,
    UNIT: tl.constexpr,
    SPANS: tl.constexpr,
):
    """Program (sequence, head, tile) scores spans, or pages of those that are looked at."""
    seq = tl.program_id(0)
    head = tl.program_id(1)
    budget_pages = tl.load(choices_ptr + seq * CHOICES_FIELDS)
    context = tl.load(rows_ptr + seq * ROWS_FIELDS + 2)
    num_pages = (context + (1 << block_shift) - 1) >> block_shift
    num_spans = tl.cdiv(num_pages, SPAN)
    looked_at = spans_looked_at(budget_pages)
    index = tl.program_id(2) * PAGES + tl.arange(0, PAGES)
    if budget_pages == 0:
        return
    if tl.load(anew_ptr + seq * anew_seq_step + head * anew_head_step) == 0:
        return
    if SPANS:
        if num_spans <= looked_at:
            return
        if tl.program_id(2) * PAGES >= num_spans:
            return
        pages = tl.minimum((index + 1) * SPAN, num_pages) - 1
        scored = index < num_spans
    else:
        if tl.program_id(2) * PAGES >= tl.minimum(num_spans, looked_at) * SPAN:
            return
        spans = index // SPAN
        if num_spans > looked_at:
            listed = (seq * num_heads + head).to(tl.int64) * most_spans
            spans = tl.load(spans_ptr + listed + spans, mask=spans < looked_at, other=0)
        pages = spans * SPAN + index % SPAN
        scored = (pages >= FIRST) & (pages < num_pages - NEWEST)
    table_ptr = lists_ptr + tl.load(tables_ptr + seq * TABLES_FIELDS)
    blocks = tl.load(table_ptr + pages, mask=scored, other=0).to(tl.int64)

    dims = tl.arange(0, DIM)
    real = dims < HEAD_DIM
    # Counted in 16 bytes, so that the compiler sees that wide loads are possible.
    units = blocks * block_units + (first_page + head).to(tl.int64) * page_units + bounds_units
    bounds_ptr = region_ptr + (units * UNIT)[:, None] + dims[None, :]
    if SPANS:
        bounds_ptr += 2 * HEAD_DIM
    wanted = scored[:, None] & real[None, :]
    least = tl.load(bounds_ptr, mask=wanted, other=0.0).to(tl.float32)
    greatest = tl.load(bounds_ptr + HEAD_DIM, mask=wanted, other=0.0).to(tl.float32)
    token = tl.load(rows_ptr + seq * ROWS_FIELDS).to(tl.int64)
    first_q_head = tl.load(order_ptr + first_head + head) * group_size
    query_ptr += token * query_token_stride + first_q_head.to(tl.int64) * query_head_stride
    best = tl.full([PAGES], float("-inf"), tl.float32)
    for row in range(group_size):
        query = tl.load(query_ptr + row * query_head_stride + dims, mask=real, other=0.0)
        query = query.to(tl.float32)[None, :]
        best = tl.maximum(best, tl.sum(tl.maximum(query * least, query * greatest), 1))
    keys = tl.where(scored, ordered_key(best), LEFT_OUT)
    listed = (seq * num_heads + head).to(tl.int64) * most_keys
    tl.store(keys_ptr + listed + index, keys, mask=index < most_keys)


@triton.jit
def count_from(keys_ptr, num_keys, bound, TILE: tl.constexpr):
    """How many keys are at least `bound`."""
    index = tl.arange(0, TILE)
    counts = tl.zeros([TILE], tl.int32)
    for first in range(0, num_keys, TILE):
        real = first + index < num_keys
        keys = tl.load(keys_ptr + first + index, mask=real, other=LEFT_OUT)
        counts += (real & (keys >= bound)).to(tl.int32)
    return tl.sum(counts, 0)


@triton.jit
def least_chosen(keys_ptr, num_keys, count, TILE: tl.constexpr):
    """The `count`-th of the highest keys, found bit by bit from the sign on."""
    found = tl.where(count_from(keys_ptr, num_keys, 0, TILE) >= count, 0, LEFT_OUT)
    for step in range(31):
        tried = found | (1 << (30 - step))
        found = tl.where(count_from(keys_ptr, num_keys, tried, TILE) >= count, tried, found)
    return found


@triton.jit(
    do_not_specialize=[
        "anew_seq_step",
        "anew_head_step",
        "num_heads",
        "block_shift",
        "most_keys",
        "most_spans",
        "most_pages",
        "most_remembered",
    ]
)
def choose_kernel(
    out_ptr,
    remembered_ptr,
    spans_ptr,
    keys_ptr,
    rows_ptr,
    choices_ptr,
    anew_ptr,
    tables_ptr,
    lists_ptr,
    anew_seq_step,
    anew_head_step,
    num_heads,
    block_shift,
    most_keys,
    most_spans,
    most_pages,
    most_remembered,
    TILE: tl.constexpr,
    SPANS: tl.constexpr,
):
    """Program (sequence, head) lists the spans to look at, or the blocks to read."""
    seq = tl.program_id(0)
    head = tl.program_id(1)
    row = (seq * num_heads + head).to(tl.int64)
    budget_pages = tl.load(choices_ptr + seq * CHOICES_FIELDS)
    if budget_pages == 0:
        return
    anew = tl.load(anew_ptr + seq * anew_seq_step + head * anew_head_step)
    context = tl.load(rows_ptr + seq * ROWS_FIELDS + 2)
    num_pages = (context + (1 << block_shift) - 1) >> block_shift
    num_spans = tl.cdiv(num_pages, SPAN)
    looked_at = spans_looked_at(budget_pages)
    table_ptr = lists_ptr + tl.load(tables_ptr + seq * TABLES_FIELDS)
    index = tl.arange(0, TILE)
    place = tl.load(choices_ptr + seq * CHOICES_FIELDS + 1).to(tl.int64)
    remembered_ptr += (place * num_heads + head) * most_remembered
    out_ptr += row * most_pages
    spans_ptr += row * most_spans
    keys_ptr += row * most_keys
    if SPANS:
        if (anew == 0) | (num_spans <= looked_at):
            return
        num_keys = num_spans
        count = looked_at
    else:
        num_keys = tl.minimum(num_spans, looked_at) * SPAN
        count = budget_pages - FIRST - NEWEST
        always = index < FIRST + NEWEST
        pages = tl.where(index < FIRST, index, num_pages - FIRST - NEWEST + index)
        places = tl.where(index < FIRST, index, budget_pages - FIRST - NEWEST + index)
        tl.store(out_ptr + places, tl.load(table_ptr + pages, mask=always), mask=always)
        out_ptr += FIRST
        if anew == 0:
            for first in range(0, count, TILE):
                real = first + index < count
                pages = tl.load(remembered_ptr + first + index, mask=real, other=0)
                blocks = tl.load(table_ptr + pages, mask=real)
                tl.store(out_ptr + first + index, blocks, mask=real)
            return

    bound = least_chosen(keys_ptr, num_keys, count, TILE)
    # The highest key there is exceeds nothing, so that one more does not overflow.
    wanted_equals = count - tl.where(
        bound == GREATEST, 0, count_from(keys_ptr, num_keys, bound + 1, TILE)
    )
    equals = 0
    listed = 0
    for first in range(0, num_keys, TILE):
        real = first + index < num_keys
        keys = tl.load(keys_ptr + first + index, mask=real, other=LEFT_OUT)
        equal = (real & (keys == bound)).to(tl.int32)
        early = (keys == bound) & (equals + tl.cumsum(equal, 0) <= wanted_equals)
        taken = real & ((keys > bound) | early)
        at = listed + tl.cumsum(taken.to(tl.int32), 0) - 1
        if SPANS:
            tl.store(spans_ptr + at, first + index, mask=taken)
        else:
            spans = (first + index) // SPAN
            if num_spans > looked_at:
                spans = tl.load(spans_ptr + spans, mask=taken, other=0)
            pages = spans * SPAN + index % SPAN
            tl.store(remembered_ptr + at, pages, mask=taken)
            tl.store(out_ptr + at, tl.load(table_ptr + pages, mask=taken), mask=taken)
        equals += tl.sum(equal, 0)
        listed += tl.sum(taken.to(tl.int32), 0)


def _types(kernel: Any, **others: str) -> dict[str, str]:
    """Types of a kernel's arguments: those that point somewhere point to int32 if not named."""
    pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
    return dict.fromkeys(pointers, "*i32") | others


def drift_variant(dtype: torch.dtype, head_dim: int) -> Variant:
    """The form of the drift kernel for a dtype and head size."""
    kind = f"*{TRITON_DTYPES[dtype]}"
    return Variant(
        name=f"drift {TRITON_DTYPES[dtype]} {head_dim}",
        kernel=drift_kernel,
        types=_types(drift_kernel, queries_ptr=kind, query_ptr=kind, min_similarity="fp32"),
        constants={"HEAD_DIM": head_dim, "DIM": padded_dim(head_dim)},
        num_warps=1,
        num_stages=1,
    )


def score_variant(dtype: torch.dtype, head_dim: int, *, spans: bool) -> Variant:
    """The form of the scoring kernel for a dtype and head size, for spans or for pages."""
    dim, kind = padded_dim(head_dim), f"*{TRITON_DTYPES[dtype]}"
    return Variant(
        name=f"score {TRITON_DTYPES[dtype]} {head_dim} {'spans' if spans else 'pages'}",
        kernel=score_kernel,
        types=_types(score_kernel, query_ptr=kind, region_ptr=kind),
        constants={
            "HEAD_DIM": head_dim,
            "DIM": dim,
            "PAGES": min(SPAN_BLOCKS, TILE_ELEMENTS // dim),
            "UNIT": SECTION_ALIGNMENT_BYTES // dtype.itemsize,
            "SPANS": spans,
        },
        num_warps=4,
        num_stages=1,
    )


def choose_variant(*, spans: bool) -> Variant:
    """The form of the choosing kernel, for spans or for pages."""
    return Variant(
        name=f"choose {'spans' if spans else 'pages'}",
        kernel=choose_kernel,
        types=_types(choose_kernel),
        constants={"TILE": KEYS_TILE, "SPANS": spans},
        num_warps=4,
        num_stages=1,
    )
