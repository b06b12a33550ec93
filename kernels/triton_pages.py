"""What the Triton kernels share: where a key lies, which keys a query sees, the running softmax.

Small tables say where things are, all int32 unless said (`triton_tables`, `triton_plan`):

    groups       int64 [num_groups, 9]         in units of SECTION_ALIGNMENT_BYTES: base, a page,
                                               and where its values, scales, minima, bounds and
                                               sums begin; pages of a block; number of their format
    group_heads  [num_groups, 4]               of one layer: heads, first in `order`, first page
    order        [num_kv_heads]                of one layer: KV heads, group by group
    group_of     [num_kv_heads, 2]             of one layer: group of a KV head, index in it
    rows         [num_seqs, 4]                 first packed row, new tokens, context
    tables       [num_groups, num_seqs, 8]     start of the block table in `lists`, sink blocks,
                                               blocks given back, sink size, window size,
                                               first split, splits
    splits       [num_groups, 2]               number of splits, their start in `lists`
    lists        [...]                         pairs (sequence, split) or (sequence, tile), and
                                               block tables

Offsets into the arena are int64: an arena has more than 2**31 elements. Because the table of groups
has them in units, the compiler knows what they are multiples of, and loads are wide. A kernel is
given the arena as elements of K and V, as bytes and as float16: the same memory, of which each
section is read by its type.
"""

import triton
import triton.language as tl

from headlong.kernels.layout import SECTION_ALIGNMENT_BYTES
from headlong.kernels.triton_codes import INT4, PLAIN, raised

LOG2_E = tl.constexpr(1.4426950408889634)
UNIT = tl.constexpr(SECTION_ALIGNMENT_BYTES)

GROUPS_FIELDS = tl.constexpr(9)
ROWS_FIELDS = tl.constexpr(4)
TABLES_FIELDS = tl.constexpr(8)
GROUP_HEADS_FIELDS = tl.constexpr(4)


@triton.jit
def load_format(groups_ptr, group):
    """Number of the format of a group's pages."""
    return tl.load(groups_ptr + group * GROUPS_FIELDS + 8)


@triton.jit
def locate_page(
    groups_ptr,
    group,
    page,
    elements_ptr,
    bytes_ptr,
    halves_ptr,
    FORMAT: tl.constexpr,
    ITEMSIZE: tl.constexpr,
):
    """Keys, values, scales and minima of a head's page in block 0; units of a block."""
    fields_ptr = groups_ptr + group * GROUPS_FIELDS
    size = tl.load(fields_ptr + 1)
    base = tl.load(fields_ptr) + page.to(tl.int64) * size
    values = base + tl.load(fields_ptr + 2)
    if FORMAT == PLAIN:
        keys_ptr = elements_ptr + base * (UNIT // ITEMSIZE)
        values_ptr = elements_ptr + values * (UNIT // ITEMSIZE)
    else:
        keys_ptr = bytes_ptr + base * UNIT
        values_ptr = bytes_ptr + values * UNIT
    scales_ptr = halves_ptr + (base + tl.load(fields_ptr + 3)) * (UNIT // 2)
    minima_ptr = halves_ptr + (base + tl.load(fields_ptr + 4)) * (UNIT // 2)
    block_units = tl.load(fields_ptr + 7) * size
    return keys_ptr, values_ptr, scales_ptr, minima_ptr, block_units


@triton.jit
def load_table(tables_ptr, lists_ptr, group, seq, num_seqs):
    """A sequence's block table in a group: its start, sink blocks, blocks gone, sinks, window."""
    fields_ptr = tables_ptr + (group * num_seqs + seq) * TABLES_FIELDS
    return (
        lists_ptr + tl.load(fields_ptr),
        tl.load(fields_ptr + 1),
        tl.load(fields_ptr + 2),
        tl.load(fields_ptr + 3),
        tl.load(fields_ptr + 4),
    )


@triton.jit
def load_blocks(positions, wanted, table_ptr, sink_blocks, gone_blocks, block_shift):
    """Block of each position; of those not wanted, 0.

    Kernels load the blocks of the next tile while they work on this one. The loads of K and V then
    wait for nothing, and the compiler can start them several tiles ahead.
    """
    logical = positions >> block_shift
    entry = tl.where(logical < sink_blocks, logical, logical - gone_blocks)
    return tl.load(table_ptr + entry, mask=wanted, other=0)


@triton.jit
def row_offsets(
    blocks,
    positions,
    block_units,
    block_shift,
    FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ITEMSIZE: tl.constexpr,
):
    """Where the row of each position begins, from the beginning of its section in block 0."""
    inside = positions & ((1 << block_shift) - 1)
    size: tl.constexpr = ITEMSIZE if FORMAT == PLAIN else 1
    row: tl.constexpr = HEAD_DIM // 2 if FORMAT == INT4 else HEAD_DIM
    return blocks.to(tl.int64) * block_units * (UNIT // size) + inside * row


@triton.jit
def scale_offsets(blocks, positions, block_units, block_shift):
    """Where the scale of each position's key lies, from the first of its section in block 0."""
    inside = positions & ((1 << block_shift) - 1)
    return blocks.to(tl.int64) * block_units * (UNIT // 2) + inside


@triton.jit
def sees(t, j, sink_size, window_size):
    """The visibility law: j <= t and (j < sink_size or j > t - window_size)."""
    return (j <= t) & ((j < sink_size) | (j > t - window_size))


@triton.jit
def scaled_logits(products, scale, softcap, SOFTCAP: tl.constexpr):
    """Logits times log2(e) of q.k products, capped if the model does so."""
    logits = products * scale
    if SOFTCAP:
        # tanh(x) = (1 - e) / (1 + e) with e = exp(-2|x|), which cannot overflow; of a small x, for
        # which 1 - e loses its digits, the series.
        x = tl.abs(logits) / softcap
        small = tl.exp2(x * (-2.0 * LOG2_E))
        square = x * x
        series = x * (
            1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
        )
        bounded = softcap * tl.where(x < 0.3, series, (1.0 - small) / (1.0 + small))
        logits = tl.where(logits < 0.0, -bounded, bounded)
    return logits * LOG2_E


@triton.jit
def accumulate(acc, total, largest, logits, values, scales, minima, FORMAT: tl.constexpr):
    """One step of the running softmax, over values or their codes.

    `acc` is the sum of exp2(logit - largest) * value and `total` that of exp2(logit - largest)
    over the keys so far. A row that has seen no key has largest = -inf. The sum of codes is a
    power of two too large: `lowered` takes it away.
    """
    now = tl.maximum(largest, tl.max(logits, 1))
    # Of a row without a key yet: exp2(-inf - 0) is 0, exp2(-inf - -inf) would be NaN.
    bound = tl.where(now == float("-inf"), 0.0, now)
    weights = tl.exp2(logits - bound[:, None])
    kept = tl.exp2(largest - bound)
    total = total * kept + tl.sum(weights, 1)
    acc = acc * kept[:, None]
    if FORMAT == INT4:
        acc += tl.sum(raised(weights, minima, FORMAT), 1)[:, None]
    if FORMAT != PLAIN:
        weights = raised(weights, scales, FORMAT)
    acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
    return acc, total, now


@triton.jit
def with_sink(total, largest, sink):
    """`total` with a learned sink logit added, which -inf leaves as it is."""
    bound = tl.where(largest == float("-inf"), 0.0, largest)
    return total + tl.exp2(sink * LOG2_E - bound)
