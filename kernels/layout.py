"""Where a KV page lies in the arena, and what it holds. Every kernel reads exactly this.

page of (layer, kv_head) in block b of group g, in bytes from the start of the arena:
    group_bases[g] + (b * group_pages[g] + head_pages[layer][kv_head]) * page_bytes[g]

The groups' regions lie one after the other, or all groups share the whole arena (bases of 0). Then
the same bytes are a block of one group at a time: the arena is cut into slabs of equal size, and a
slab that a group has lends it the blocks that lie wholly inside.

inside a page, one after the other, each beginning at a multiple of 16 bytes:
    keys       [block_size, head_dim], or packed [block_size, packed_bytes]
    values     likewise
    scales     float16 [2, block_size], of keys, then of values            if quantised
    minima     float16 [2, block_size], what code 0 stands for             if quantised to int4
    bounds     [4, head_dim]: least and greatest key of the page, channel
               by channel, then of its span up to and with the page        if summarised
    sums       float32 [2, head_dim]: of all keys, then of all values,
               from the sinks' end to the beginning of the page            if compensated
"""

import math
from dataclasses import dataclass

import torch

GROUP_ALIGNMENT_BYTES = 256
SECTION_ALIGNMENT_BYTES = 16

SPAN_BLOCKS = 32
"""Pages whose bounds are summed up in one, for a choice of pages in two steps."""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How K and V lie in a page in fewer bits than the layers make them of.

    Attributes:
        name: As the command line spells it.
        element_bits: Bits of one element.
        has_minimum: Whether codes count from a minimum of their own, beside a scale.
    """

    name: str
    element_bits: int
    has_minimum: bool = False

    def packed_bytes(self, head_dim: int) -> int:
        """Bytes of one token's K, and again of its V."""
        return head_dim * self.element_bits // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of what turns one token's K, and again its V, back: a scale, and its minimum."""
        return 4 if self.has_minimum else 2


QUANTISATIONS: dict[str, Quantisation] = {
    each.name: each
    for each in (
        Quantisation("fp8", element_bits=8),
        Quantisation("int8", element_bits=8),
        Quantisation("int4", element_bits=4, has_minimum=True),
    )
}
"""Scales and minima are float16, one each for every token and head. `kernels.codes` has them."""


@dataclass(frozen=True, slots=True)
class PageLayout:
    """K and V of `block_size` tokens for one KV head of one layer, and what is said of them.

    Attributes:
        block_size: Tokens.
        head_dim: Elements of K, and of V, of one token; even.
        dtype: Of the elements, as the layers make them and as they lie here if not quantised; of
            the bounds.
        quantisation: How they lie here; None as they are.
        summarised: Whether the page knows the bounds of its keys.
        compensated: Whether the page knows the sums of what may be dropped before it.
        compensated_from: First layer whose heads let them stand for what they dropped.
    """

    block_size: int
    head_dim: int
    dtype: torch.dtype
    quantisation: Quantisation | None = None
    summarised: bool = False
    compensated: bool = False
    compensated_from: int = 0

    @property
    def packed_bytes(self) -> int:
        """Bytes of one token's K, and again of its V."""
        if self.quantisation is None:
            return self.head_dim * self.dtype.itemsize
        return self.quantisation.packed_bytes(self.head_dim)

    @property
    def entry_bytes(self) -> int:
        """Bytes of one token, K and V together, with what turns them back."""
        scales = 0 if self.quantisation is None else self.quantisation.scale_bytes
        return 2 * (self.packed_bytes + scales)

    @property
    def values_at(self) -> int:
        """Byte of the page where the values begin; the keys begin at 0."""
        return _aligned(self.block_size * self.packed_bytes)

    @property
    def scales_at(self) -> int:
        """Byte of the page where the scales begin."""
        return 2 * self.values_at

    @property
    def minima_at(self) -> int:
        """Byte of the page where the minima begin."""
        scales = 0 if self.quantisation is None else 2 * 2 * self.block_size
        return _aligned(self.scales_at + scales)

    @property
    def bounds_at(self) -> int:
        """Byte of the page where the bounds begin."""
        has_minima = self.quantisation is not None and self.quantisation.has_minimum
        return _aligned(self.minima_at + (2 * 2 * self.block_size if has_minima else 0))

    @property
    def sums_at(self) -> int:
        """Byte of the page where the sums begin."""
        bounds = 4 * self.head_dim * self.dtype.itemsize if self.summarised else 0
        return _aligned(self.bounds_at + bounds)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: a multiple of 16."""
        return _aligned(self.sums_at + (2 * 4 * self.head_dim if self.compensated else 0))

    def compensates(self, layer: int) -> bool:
        """Whether one more entry stands for what a layer's heads dropped."""
        return self.compensated and layer >= self.compensated_from


def _aligned(offset: int) -> int:
    return -(-offset // SECTION_ALIGNMENT_BYTES) * SECTION_ALIGNMENT_BYTES


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
        num_blocks: Blocks of each group; if the groups share the arena, its ids are below this.
        group_bases: Byte offset of each group's region.
        total_bytes: Bytes of the whole arena.
        layers: For each layer, its heads group by group; together they are all its KV heads.
        slab_bytes: Bytes of a slab if the groups share the arena; 0 if each has its region.
    """

    pages: tuple[PageLayout, ...]
    group_pages: tuple[int, ...]
    num_blocks: tuple[int, ...]
    group_bases: tuple[int, ...]
    total_bytes: int
    layers: tuple[tuple[LayerHeads, ...], ...]
    slab_bytes: int = 0

    @property
    def num_slabs(self) -> int:
        """Slabs that the groups share; 0 if each has its region."""
        return self.total_bytes // self.slab_bytes if self.slab_bytes else 0

    def slab_blocks(self, group: int) -> int:
        """Blocks that a slab lends to `group`, the same for every slab."""
        return blocks_in_slab(self.slab_bytes, self.block_bytes(group))

    def first_of_slab(self, group: int, slab: int) -> int:
        """The first of the consecutive blocks that `slab` lends to `group`."""
        return -(-slab * self.slab_bytes // self.block_bytes(group))

    def slab_of(self, group: int, block: int) -> int:
        """The slab in which a block of `group` begins."""
        return block * self.block_bytes(group) // self.slab_bytes

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
        """The group's region as pages of bytes.

        Args:
            arena: uint8 [total_bytes].
            group: Index of the head group.

        Returns:
            A view, uint8 [num_blocks, group_pages, page_bytes].
        """
        num_bytes = self.num_blocks[group] * self.block_bytes(group)
        region = arena.narrow(0, self.group_bases[group], num_bytes)
        return region.view(self.num_blocks[group], self.group_pages[group], -1)


@dataclass(frozen=True, slots=True)
class PageViews:
    """The sections of a group's pages, as views of the arena. Absent sections are None.

    Attributes:
        keys: [num_blocks, group_pages, block_size, head_dim] in the page's dtype, or uint8
            [..., packed_bytes] if quantised.
        values: Likewise.
        scales: float16 [num_blocks, group_pages, 2, block_size].
        minima: float16 [num_blocks, group_pages, 2, block_size].
        bounds: [num_blocks, group_pages, 4, head_dim] in the page's dtype.
        sums: float32 [num_blocks, group_pages, 2, head_dim].
    """

    keys: torch.Tensor
    values: torch.Tensor
    scales: torch.Tensor | None
    minima: torch.Tensor | None
    bounds: torch.Tensor | None
    sums: torch.Tensor | None


def view_pages(layout: ArenaLayout, arena: torch.Tensor, group: int) -> PageViews:
    """Take a group's pages apart.

    Args:
        layout: The arena's map.
        arena: uint8 [total_bytes].
        group: Index of the head group.
    """
    page = layout.pages[group]
    pages = layout.view_group(arena, group)
    quantised = page.quantisation is not None
    dtype = torch.uint8 if quantised else page.dtype

    def section(start: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        return pages[..., start : start + size].view(dtype).view(*pages.shape[:2], *shape)

    entry = page.packed_bytes // dtype.itemsize
    return PageViews(
        keys=section(0, dtype, page.block_size, entry),
        values=section(page.values_at, dtype, page.block_size, entry),
        scales=section(page.scales_at, torch.float16, 2, page.block_size) if quantised else None,
        minima=section(page.minima_at, torch.float16, 2, page.block_size)
        if page.quantisation is not None and page.quantisation.has_minimum
        else None,
        bounds=section(page.bounds_at, page.dtype, 4, page.head_dim) if page.summarised else None,
        sums=section(page.sums_at, torch.float32, 2, page.head_dim) if page.compensated else None,
    )


def blocks_in_slab(slab_bytes: int, block_bytes: int) -> int:
    """Blocks that lie wholly inside a slab, wherever in the arena the slab is.

    A block begins at a multiple of its bytes. If the slab is none, blocks straddle its ends: it
    begins at least gcd(slab, block) bytes after a block did, and the worst case is just that.
    """
    if slab_bytes % block_bytes == 0:
        return slab_bytes // block_bytes
    return max(0, (slab_bytes + math.gcd(slab_bytes, block_bytes)) // block_bytes - 1)


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
    layers = _place_heads(members)
    if min(num_blocks) < 1:
        raise ValueError(f"num_blocks must be at least 1 each, got {num_blocks}")
    bases: list[int] = []
    offset = 0
    for count, heads, page in zip(num_blocks, members, pages, strict=True):
        bases.append(offset)
        offset += count * len(heads) * page.page_bytes
        offset = -(-offset // GROUP_ALIGNMENT_BYTES) * GROUP_ALIGNMENT_BYTES
    return ArenaLayout(
        pages=pages,
        group_pages=tuple(len(heads) for heads in members),
        num_blocks=num_blocks,
        group_bases=tuple(bases),
        total_bytes=offset,
        layers=layers,
    )


def build_slab_layout(
    members: tuple[tuple[tuple[int, int], ...], ...],
    pages: tuple[PageLayout, ...],
    slab_bytes: int,
    num_slabs: int,
) -> ArenaLayout:
    """Let the groups share one arena.

    Args:
        members: As for `build_arena_layout`.
        pages: Page layout of each group.
        slab_bytes: Bytes of a slab.
        num_slabs: Slabs of the arena.

    Returns:
        The layout.

    Raises:
        ValueError: As by `build_arena_layout`, or a slab holds no block of some group.
    """
    if len(members) != len(pages):
        raise ValueError(
            f"members and pages must be as long as each other, got {len(members)}, {len(pages)}"
        )
    layers = _place_heads(members)
    block_bytes = [len(heads) * page.page_bytes for heads, page in zip(members, pages, strict=True)]
    if num_slabs < 1:
        raise ValueError(f"num_slabs must be at least 1, got {num_slabs}")
    if min(blocks_in_slab(slab_bytes, each) for each in block_bytes) < 1:
        raise ValueError(f"slab_bytes must hold a block of each group, got {slab_bytes}")
    total_bytes = num_slabs * slab_bytes
    return ArenaLayout(
        pages=pages,
        group_pages=tuple(len(heads) for heads in members),
        num_blocks=tuple(total_bytes // each for each in block_bytes),
        group_bases=(0,) * len(members),
        total_bytes=total_bytes,
        layers=layers,
        slab_bytes=slab_bytes,
    )


def _place_heads(
    members: tuple[tuple[tuple[int, int], ...], ...],
) -> tuple[tuple[LayerHeads, ...], ...]:
    """For each layer, its heads group by group.

    Raises:
        ValueError: A group is empty or unsorted, or a head is in two groups.
    """
    everyone = [head for group in members for head in group]
    if not everyone:
        raise ValueError("members must name at least one head")
    if len(set(everyone)) != len(everyone):
        raise ValueError("a head is listed twice among the members")
    layers: list[list[LayerHeads]] = [[] for _ in range(1 + max(layer for layer, _ in everyone))]
    for group, heads in enumerate(members):
        if not heads or list(heads) != sorted(heads):
            raise ValueError(f"members of group {group} must be sorted and not empty, got {heads}")
        for layer in sorted({layer for layer, _ in heads}):
            kv_heads = tuple(head for owner, head in heads if owner == layer)
            layers[layer].append(LayerHeads(group, heads.index((layer, kv_heads[0])), kv_heads))
    return tuple(tuple(heads) for heads in layers)
