"""How large the slabs of an arena are that head groups share.

Large slabs strand memory where each group's last one is partly filled, small ones where blocks
would straddle their ends. A slab is a multiple of the largest block, so that this one never does.
"""

from collections.abc import Sequence

from headlong.kernels.layout import blocks_in_slab


def choose_slab_bytes(block_bytes: Sequence[int], arena_bytes: int) -> int | None:
    """The slab that strands least.

    The part of the arena that is stranded at worst, where g is the group that loses most:

        1 - blocks(g) * block_bytes(g) / slab  +  groups * slab / arena

    Args:
        block_bytes: Bytes of a block of each group.
        arena_bytes: Most that the arena may take, or have a use for.

    Returns:
        Bytes of a slab; None if there would be fewer slabs than groups.
    """
    largest, num_groups = max(block_bytes), len(block_bytes)
    best: int | None = None
    least = 1.0
    for slab in range(largest, arena_bytes // num_groups + 1, largest):
        unfilled = num_groups * slab / arena_bytes
        if unfilled >= least:
            break
        lost = unfilled + straddled(block_bytes, slab)
        if lost < least:
            best, least = slab, lost
    return best


def straddled(block_bytes: Sequence[int], slab_bytes: int) -> float:
    """The largest part of a slab that the blocks of a group leave at its ends."""
    used = min(blocks_in_slab(slab_bytes, each) * each for each in block_bytes)
    return 1 - used / slab_bytes
