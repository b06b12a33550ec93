"""Pages filled with random values that are valid in their format."""

from collections.abc import Iterable

import gpu_checkout  # noqa: F401
import torch

from headlong.kernels.codes import quantise
from headlong.kernels.layout import ArenaLayout, PageViews, view_pages

NAN_BYTE = 0xFF
"""Floats of any size that are made of this byte are NaN."""

FP8_FINITE = 0xF7
"""Bits of a float8 e4m3 that, whatever they are, make no NaN."""

SPREAD = 2.0
"""K and V made of random codes lie between this and its negative."""


def fill_pages(layout: ArenaLayout, arena: torch.Tensor) -> None:
    """Random values in every section of every page, in place: arenas are as large as a device.

    Bounds are drawn like all else, and choices of pages fall anywhere.
    """
    for group in range(layout.num_groups):
        pages, quantisation = view_pages(layout, arena, group), layout.pages[group].quantisation
        for section in (pages.keys, pages.values):
            if quantisation is None:
                section.normal_()
                continue
            section.random_(0, 256)
            if quantisation.name == "fp8":
                section.bitwise_and_(FP8_FINITE)
        if pages.scales is not None and quantisation is not None:
            steps = {"int8": 127.0, "fp8": 240.0, "int4": 7.5}[quantisation.name]
            pages.scales.fill_(SPREAD / steps)
        if pages.minima is not None:
            pages.minima.fill_(-SPREAD)
        _draw_summaries(pages, slice(None), None)


def fill_written(
    layout: ArenaLayout,
    arena: torch.Tensor,
    group: int,
    held: Iterable[tuple[int, int]],
    generator: torch.Generator,
) -> None:
    """Random K and V, and what their pages say, where tokens are cached; NaN everywhere else.

    Args:
        layout: The arena's map.
        arena: uint8 [total_bytes].
        group: Whose blocks.
        held: Blocks, and how many of the tokens in each, or after its first one, are cached.
        generator: On the arena's device.
    """
    layout.view_group(arena, group).fill_(NAN_BYTE)
    page, pages = layout.pages[group], view_pages(layout, arena, group)
    for block, later in held:
        count = min(page.block_size, later)
        if count <= 0:
            continue
        for which, section in enumerate((pages.keys, pages.values)):
            shape = layout.group_pages[group], count, page.head_dim
            drawn = torch.randn(shape, device=arena.device, generator=generator).to(page.dtype)
            if page.quantisation is None:
                section[block, :, :count] = drawn
                continue
            codes = quantise(drawn, page.quantisation)
            section[block, :, :count] = codes.packed
            assert pages.scales is not None
            pages.scales[block, :, which, :count] = codes.scales
            if pages.minima is not None and codes.minima is not None:
                pages.minima[block, :, which, :count] = codes.minima
        _draw_summaries(pages, slice(block, block + 1), generator)


def _draw_summaries(pages: PageViews, blocks: slice, generator: torch.Generator | None) -> None:
    if pages.bounds is not None:
        # Of the page, then of its span: the least and the greatest.
        bounds = pages.bounds[blocks]
        bounds.normal_(generator=generator).abs_()
        bounds[:, :, 0::2].neg_()
    if pages.sums is not None:
        pages.sums[blocks].normal_(generator=generator)
