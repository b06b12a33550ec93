"""Where a KV page lies in the arena, and what it holds. Every kernel reads exactly this.

page of (layer, kv_head) in block b of group g, in bytes from the start of the arena:
    group_bases[g] + (b * group_pages[g] + head_pages[layer][kv_head]) * page_bytes[g]

inside a page:  K [block_size, head_dim], then V [block_size, head_dim]

Quantised pages have a size here and no kernels yet: capacity can be planned for them.
"""

from dataclasses import dataclass

import torch

GROUP_ALIGNMENT_BYTES = 256


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How K and V lie in a page in fewer bits than the layers make them of.

    Attributes:
        name: As the command line spells it.
        element_bits: Bits of one element.
        scale_bytes: Bytes of what turns one head's K of one token, and again its V, back: a scale,
            and a zero point if there is one.
    """

    name: str
    element_bits: int
    scale_bytes: int


QUANTISATIONS: dict[str, Quantisation] = {
    each.name: each
    for each in (
        Quantisation("fp8", element_bits=8, scale_bytes=2),
        Quantisation("int8", element_bits=8, scale_bytes=2),
        Quantisation("int4", element_bits=4, scale_bytes=4),
    )
}
"""Scales and zero points are float16, one each for every token and head."""


@dataclass(frozen=True, slots=True)
class PageLayout:
    """K and V of `block_size` tokens for one KV head of one layer.

    Attributes:
        block_size: Tokens.
        head_dim: Elements of K, and of V, of one token.
        dtype: Of the elements, as the layers make them and as they lie here if not quantised.
        quantisation: How they lie here; None as they are.
    """

    block_size: int
    head_dim: int
    dtype: torch.dtype
    quantisation: Quantisation | None = None

    @property
    def entry_bytes(self) -> int:
        """Bytes of one token, K and V together."""
        if self.quantisation is None:
            return 2 * self.head_dim * self.dtype.itemsize
        packed = -(-self.head_dim * self.quantisation.element_bits // 8)
        return 2 * (packed + self.quantisation.scale_bytes)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, K and V together."""
        return self.block_size * self.entry_bytes


@dataclass(frozen=True, slots=True)
class LayerHeads:
    """The KV heads of one layer that lie in one group; their pages are neighbours in a block."""

    group: int
    first_page: int
    kv_heads: tuple[int, ...]


@dataclass(frozen=True)
class ArenaLayout:
    """The arena's map: one region a head group, blocks within it, pages within a block.

    Attributes:
        pages: Page layout of each group.
        group_pages: Pages of one block of each group, which is its number of members.
        num_blocks: Blocks of each group.
        group_bases: Byte offset of each group's region.
        total_bytes: Bytes of the whole arena.
        layers: For each layer, its heads group by group; together they are all its KV heads.
    """

    pages: tuple[PageLayout, ...]
    group_pages: tuple[int, ...]
    num_blocks: tuple[int, ...]
    group_bases: tuple[int, ...]
    total_bytes: int
    layers: tuple[tuple[LayerHeads, ...], ...]

    @property
    def num_groups(self) -> int:
        """Number of head groups."""
        return len(self.group_pages)

    def block_bytes(self, group: int) -> int:
        """Bytes of one block of `group`: a page for every member."""
        return self.group_pages[group] * self.pages[group].page_bytes

    def head_page(self, layer: int, kv_head: int) -> tuple[int, int]:
        """Group of a head and the index of its page within that group's blocks."""
        for heads in self.layers[layer]:
            if kv_head in heads.kv_heads:
                return heads.group, heads.first_page + heads.kv_heads.index(kv_head)
        raise ValueError(f"layer {layer} has no KV head {kv_head}")

    def view_group(self, arena: torch.Tensor, group: int) -> torch.Tensor:
        """The group's region as pages.

        Args:
            arena: uint8 [total_bytes].
            group: Index of the head group.

        Returns:
            A view [num_blocks, group_pages, 2, block_size, head_dim] in the group's dtype; index
            0 of axis 2 is K, 1 is V.
        """
        page = self.pages[group]
        num_bytes = self.num_blocks[group] * self.block_bytes(group)
        region = arena.narrow(0, self.group_bases[group], num_bytes).view(page.dtype)
        return region.view(
            self.num_blocks[group], self.group_pages[group], 2, page.block_size, page.head_dim
        )


def build_arena_layout(
    members: tuple[tuple[tuple[int, int], ...], ...],
    pages: tuple[PageLayout, ...],
    num_blocks: tuple[int, ...],
) -> ArenaLayout:
    """Lay the groups one after the other.

    Args:
        members: For each group its (layer, kv_head) pairs, sorted; together they are every head
            of the model once.
        pages: Page layout of each group.
        num_blocks: Blocks of each group.

    Returns:
        The layout.

    Raises:
        ValueError: The lengths differ, a group is empty or unsorted, or a head is in two groups.
    """
    if not len(members) == len(pages) == len(num_blocks):
        raise ValueError(
            f"members, pages and num_blocks must be as long as each other, "
            f"got {len(members)}, {len(pages)}, {len(num_blocks)}"
        )
    everyone = [head for group in members for head in group]
    if not everyone:
        raise ValueError("members must name at least one head")
    if len(set(everyone)) != len(everyone):
        raise ValueError("a head is listed twice among the members")
    if min(num_blocks) < 1:
        raise ValueError(f"num_blocks must be at least 1 each, got {num_blocks}")
    bases: list[int] = []
    offset = 0
    layers: list[list[LayerHeads]] = [[] for _ in range(1 + max(layer for layer, _ in everyone))]
    for group, heads in enumerate(members):
        if not heads or list(heads) != sorted(heads):
            raise ValueError(f"members of group {group} must be sorted and not empty, got {heads}")
        bases.append(offset)
        offset += num_blocks[group] * len(heads) * pages[group].page_bytes
        offset = -(-offset // GROUP_ALIGNMENT_BYTES) * GROUP_ALIGNMENT_BYTES
        for layer in sorted({layer for layer, _ in heads}):
            kv_heads = tuple(head for owner, head in heads if owner == layer)
            layers[layer].append(LayerHeads(group, heads.index((layer, kv_heads[0])), kv_heads))
    return ArenaLayout(
        pages=pages,
        group_pages=tuple(len(heads) for heads in members),
        num_blocks=num_blocks,
        group_bases=tuple(bases),
        total_bytes=offset,
        layers=tuple(tuple(heads) for heads in layers),
    )
