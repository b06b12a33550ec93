"""What pages say of their keys: bounds for a choice of pages, sums for what windows drop."""

from dataclasses import dataclass

import torch

from headlong.kernels.layout import SPAN_BLOCKS
from headlong.kernels.reference_pages import SequencePages


@dataclass(frozen=True, slots=True)
class DroppedMean:
    """What stands for the tokens that a window has left behind.

    Attributes:
        count: How many there are.
        key: float64 [head_dim], mean of their keys.
        value: float64 [head_dim], mean of their values.
    """

    count: int
    key: torch.Tensor
    value: torch.Tensor


def summarise(pages: SequencePages, context_len: int, num_new: int) -> None:
    """Bring bounds and sums up to date after a sequence's new tokens were written.

    Blocks are taken in order, so that what they say depends on the tokens alone and not on how many
    came at once.

    Args:
        pages: The sequence's pages.
        context_len: Its tokens, the new ones included.
        num_new: New tokens, at least 1.
    """
    size = pages.block_size
    first = context_len - num_new
    for logical in range(first // size, (context_len - 1) // size + 1):
        if logical not in pages.logical:
            continue
        if pages.views.bounds is not None:
            _write_bounds(pages, logical, context_len)
        if pages.views.sums is not None and first <= logical * size:
            _write_sums(pages, logical)


def _write_bounds(pages: SequencePages, logical: int, context_len: int) -> None:
    """Least and greatest key of a page, then of its span up to and with the page."""
    bounds = pages.views.bounds
    assert bounds is not None
    keys = pages.keys(pages.positions(context_len, [logical])).to(bounds.dtype)
    least, greatest = keys.amin(0), keys.amax(0)
    own = bounds[pages.block(logical), pages.page]
    own[0], own[1] = least, greatest
    if logical % SPAN_BLOCKS:
        before = bounds[pages.block(logical - 1), pages.page]
        least, greatest = torch.minimum(least, before[2]), torch.maximum(greatest, before[3])
    own[2], own[3] = least, greatest


def _write_sums(pages: SequencePages, logical: int) -> None:
    """K and V of all tokens from the sinks' end to the beginning of a page, in float32."""
    sums = pages.views.sums
    assert sums is not None
    own = sums[pages.block(logical), pages.page]
    own.zero_()
    if logical > 0 and logical - 1 in pages.logical:
        own += sums[pages.block(logical - 1), pages.page]
        positions = pages.positions(logical * pages.block_size, [logical - 1])
        positions = positions[positions >= pages.sink_size]
        own[0] += pages.keys(positions).float().sum(0)
        own[1] += pages.values(positions).float().sum(0)


def dropped_mean(pages: SequencePages, position: int) -> DroppedMean | None:
    """The mean of the tokens that a query does not see any more.

    Args:
        pages: The sequence's pages.
        position: The query's.

    Returns:
        The mean; None if the group is not compensated, or nothing was dropped.
    """
    first_visible = position - pages.window_size + 1
    count = first_visible - pages.sink_size
    if pages.views.sums is None or count <= 0:
        return None
    logical = first_visible // pages.block_size
    sums = pages.views.sums[pages.block(logical), pages.page].double()
    positions = pages.positions(first_visible, [logical])
    positions = positions[positions >= pages.sink_size]
    return DroppedMean(
        count,
        (sums[0] + pages.keys(positions).sum(0)) / count,
        (sums[1] + pages.values(positions).sum(0)) / count,
    )
