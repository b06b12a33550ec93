"""What each rank's arena holds: the same blocks as every other's, of its own heads only.

Which blocks a sequence holds depends on policies alone, so the same block tables are right on every
rank. A rank's arena has as many blocks of each group as the others', and its blocks have pages for
the members that it computes.
"""

from dataclasses import dataclass, replace

from headlong.cache.cache_shape import CacheShape
from headlong.cache.capacity import MemoryPlan, lay_out, plan_blocks
from headlong.cache.groups import HeadGroup
from headlong.kernels.layout import ArenaLayout, build_arena_layout
from headlong.server.engine.head_dealing import HeadDealing, HeadShare


@dataclass(frozen=True, slots=True)
class LocalArena:
    """One rank's part of the cache.

    Attributes:
        layout: Its arena's map, the heads of a layer numbered from 0.
        groups: For each group of that map, its index among the model's groups; a group of which the
            rank has no member is not in it.
    """

    layout: ArenaLayout
    groups: tuple[int, ...]


def plan_ranks(
    shape: CacheShape, budget_bytes: int, max_model_len: int, dealing: HeadDealing
) -> tuple[MemoryPlan, ArenaLayout]:
    """Size the arenas of all ranks.

    Args:
        shape: The whole cache's shape.
        budget_bytes: Most bytes of each rank's arena.
        max_model_len: Longest sequence in tokens.
        dealing: Who computes which heads.

    Returns:
        The plan and the map of all arenas together, as if one rank had them all: what blocks hold
        and how many there are is said by these. No rank's own arena is larger than its budget.

    Raises:
        CapacityError: Not even one sequence fits.
    """
    # As if one rank had the most members of every group that any has.
    widest = replace(
        shape,
        groups=tuple(
            replace(group, members=group.members[: max(map(len, _members(group, dealing)))])
            for group in shape.groups
        ),
    )
    return lay_out(shape, plan_blocks(widest, budget_bytes, max_model_len), max_model_len)


def local_arena(
    layout: ArenaLayout, groups: tuple[HeadGroup, ...], share: HeadShare | None
) -> LocalArena:
    """What of a cache lies on one rank.

    Args:
        layout: The whole cache's map.
        groups: The model's head groups.
        share: The rank's heads; None if there is one rank.
    """
    if share is None:
        return LocalArena(layout, tuple(range(len(groups))))
    members = [_members(group, share.dealing)[share.rank] for group in groups]
    present = tuple(index for index, heads in enumerate(members) if heads)
    return LocalArena(
        build_arena_layout(
            members=tuple(members[index] for index in present),
            pages=tuple(layout.pages[index] for index in present),
            num_blocks=tuple(layout.num_blocks[index] for index in present),
        ),
        present,
    )


def _members(group: HeadGroup, dealing: HeadDealing) -> list[tuple[tuple[int, int], ...]]:
    """A group's members on each rank, by the number that the rank gives them."""
    found: list[tuple[tuple[int, int], ...]] = []
    for rank in range(dealing.num_ranks):
        own = dealing.members(rank)
        found.append(tuple(sorted((head[0], own[head]) for head in group.members if head in own)))
    return found
