"""K and V in the pages of one head group, as the PyTorch path writes and reads them.

Pages that are not quantised are read as they are. Of those that are, codes are read as float32
numbers, which is exact, and what turns them back is left to the products: a scale belongs to a
whole key or value, so it is cheaper on logits and weights than on elements.
"""

from dataclasses import dataclass

import torch

from headlong.kernels.codes import quantise
from headlong.kernels.layout import ArenaLayout, LayerHeads, Quantisation, view_pages

KEYS = 0
VALUES = 1

TILE_BYTES = 1 << 20
"""K or V gathered at a time: it should stay in a core's second-level cache."""

CUDA_TILE_BYTES = 1 << 26
"""The same on a GPU, where a small tile costs more to launch than to compute."""

FP8_UNIT = 256.0
"""What 1.0 stands for as `_unpack_into` writes fp8 codes."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """Memory that every tile of a loop is gathered into, so that it stays in the CPU's cache.

    Attributes:
        packed: uint8 [num_pages, block_size * packed_bytes]; None if pages are not quantised.
        elements: [num_pages, block_size * head_dim] in the dtype of the products.
    """

    packed: torch.Tensor | None
    elements: torch.Tensor


@dataclass(frozen=True, slots=True)
class Tile:
    """K, or V, of some pages side by side: x = codes * scales + minima.

    Attributes:
        codes: [num_rows, num_keys, head_dim], or x itself if there are no scales.
        scales: float32 [num_rows, 1, num_keys]; None if pages are not quantised.
        minima: float32 [num_rows, 1, num_keys]; None for 0.
    """

    codes: torch.Tensor
    scales: torch.Tensor | None
    minima: torch.Tensor | None

    def dot(self, query: torch.Tensor) -> torch.Tensor:
        """Products q.x.

        Args:
            query: [num_rows, group_size, head_dim] in the dtype of the codes.

        Returns:
            [num_rows, group_size, num_keys] in the same dtype.
        """
        products = torch.bmm(query, self.codes.transpose(1, 2))
        if self.scales is not None:
            products *= self.scales
        if self.minima is not None:
            products.addcmul_(query.sum(-1, keepdim=True), self.minima)
        return products

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        """Sums of x by weight.

        Args:
            weights: [num_rows, group_size, num_keys] in the dtype of the codes.

        Returns:
            [num_rows, group_size, head_dim] in the same dtype.
        """
        scaled = weights if self.scales is None else weights * self.scales
        mixed = torch.bmm(scaled, self.codes)
        if self.minima is not None:
            mixed += torch.bmm(weights, self.minima.transpose(1, 2))
        return mixed

    def clear(self, num_seqs: int, seqs: torch.Tensor, keys: torch.Tensor) -> None:
        """Make x of some keys 0, whatever their slots hold; their codes are finite numbers.

        Args:
            num_seqs: Sequences; the rows of each are next to each other.
            seqs: int64 [num_cleared].
            keys: int64 [num_cleared], indices into the tile.
        """
        if self.scales is None:
            self.codes.view(num_seqs, -1, *self.codes.shape[1:])[seqs, :, keys] = 0
            return
        for each in (self.scales, self.minima):
            if each is not None:
                each.view(num_seqs, -1, each.shape[2])[seqs, :, keys] = 0

    def restore(self) -> torch.Tensor:
        """x, [num_rows, num_keys, head_dim]; the codes are overwritten."""
        if self.scales is not None:
            self.codes.mul_(self.scales.transpose(1, 2))
        if self.minima is not None:
            self.codes.add_(self.minima.transpose(1, 2))
        return self.codes


class GroupPages:
    """One group's pages, numbered through: page p of block b is b * group_pages + p.

    Args:
        layout: The arena's map.
        arena: uint8 [total_bytes].
        group: Index of the head group.

    Attributes:
        layout: What a page is.
        dtype: In which products are taken: of the pages, or float32 if they are quantised.
        bounds: [num_pages, 4, head_dim], a view; None if not summarised.
        sums: float32 [num_pages, 2, head_dim], a view; None if not compensated.
    """

    def __init__(self, layout: ArenaLayout, arena: torch.Tensor, group: int) -> None:
        self.layout = layout.pages[group]
        quantisation = self.layout.quantisation
        self.dtype = self.layout.dtype if quantisation is None else torch.float32
        self._quantisation = quantisation
        self._group_pages = layout.group_pages[group]
        self._device = arena.device
        views = view_pages(layout, arena, group)
        self.bounds = None if views.bounds is None else views.bounds.flatten(0, 1)
        self.sums = None if views.sums is None else views.sums.flatten(0, 1)
        # Of keys and of values, token by token and page by page.
        self._tokens = views.keys.flatten(0, 1), views.values.flatten(0, 1)
        self._whole = tuple(section.flatten(1) for section in self._tokens)
        self._scales = None if views.scales is None else views.scales.flatten(0, 1).unbind(1)
        self._minima = None if views.minima is None else views.minima.flatten(0, 1).unbind(1)

    def numbers(self, heads: LayerHeads, blocks: torch.Tensor) -> torch.Tensor:
        """Pages of a layer's heads.

        Args:
            heads: The heads.
            blocks: int64 [..., n], where an axis before the last broadcasts over heads.

        Returns:
            int64 [..., heads, n].
        """
        last = heads.first_page + len(heads.kv_heads)
        first = torch.arange(heads.first_page, last, device=self._device)[:, None]
        return blocks * self._group_pages + first

    def append(
        self, pages: torch.Tensor, offsets: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Write new tokens.

        Args:
            pages: int64 [heads, total_tokens], from `numbers`.
            offsets: int64 [total_tokens], token of the page.
            key: [heads, total_tokens, head_dim].
            value: [heads, total_tokens, head_dim].
        """
        if self._quantisation is None:
            self._tokens[KEYS][pages, offsets] = key
            self._tokens[VALUES][pages, offsets] = value
            return
        codes = quantise(torch.stack([key, value]), self._quantisation)
        for which in (KEYS, VALUES):
            self._tokens[which][pages, offsets] = codes.packed[which]
            for sections, new in ((self._scales, codes.scales), (self._minima, codes.minima)):
                if sections is not None and new is not None:
                    sections[which][pages, offsets] = new[which]

    def tile_blocks(self, num_rows: int) -> int:
        """Blocks of each of `num_rows` rows that make up a tile of the right size, at least 1."""
        tile_bytes = TILE_BYTES if self._device.type == "cpu" else CUDA_TILE_BYTES
        return max(1, tile_bytes // (num_rows * self._page_elements * self.dtype.itemsize))

    def scratch(self, num_pages: int) -> Scratch:
        """Memory for a tile of `num_pages` pages."""
        packed = None
        if self._quantisation is not None:
            packed = self._whole[KEYS].new_empty(num_pages, self._whole[KEYS].shape[1])
        elements = torch.empty(
            num_pages, self._page_elements, dtype=self.dtype, device=self._device
        )
        return Scratch(packed, elements)

    def tile(self, which: int, pages: torch.Tensor, scratch: Scratch | None = None) -> Tile:
        """Gather K or V.

        Args:
            which: `KEYS` or `VALUES`.
            pages: int64 [..., n], the pages of each row side by side.
            scratch: Where to gather; what it held is lost.

        Returns:
            The tile, num_keys = n * block_size; it lies in the scratch memory if there is any.
        """
        index = pages.reshape(-1)
        num_keys = pages.shape[-1] * self.layout.block_size
        shape = (-1, num_keys, self.layout.head_dim)
        scratch = scratch or self.scratch(len(index))
        elements = scratch.elements[: len(index)]
        if scratch.packed is None or self._quantisation is None:
            torch.index_select(self._whole[which], 0, index, out=elements)
            return Tile(elements.view(shape), None, None)
        packed = scratch.packed[: len(index)]
        torch.index_select(self._whole[which], 0, index, out=packed)
        _unpack_into(elements, packed, self._quantisation)

        assert self._scales is not None
        scales = self._scales[which].index_select(0, index).float()
        if self._quantisation.name == "fp8":
            scales *= FP8_UNIT
        minima = None
        if self._minima is not None:
            minima = self._minima[which].index_select(0, index).float().view(-1, 1, num_keys)
        return Tile(elements.view(shape), scales.view(-1, 1, num_keys), minima)

    def read(self, which: int, pages: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """K or V itself.

        Args:
            which: `KEYS` or `VALUES`.
            pages: int64 [..., n], the pages of each row side by side.
            dtype: Of the result.

        Returns:
            [num_rows, n * block_size, head_dim].
        """
        if self._quantisation is None:
            return self.tile(which, pages).codes.to(dtype)
        rows = pages.reshape(-1, pages.shape[-1])
        block_size, head_dim = self.layout.block_size, self.layout.head_dim
        num_rows, num_blocks = rows.shape
        x = torch.empty(
            num_rows, num_blocks * block_size, head_dim, dtype=dtype, device=self._device
        )
        step = min(self.tile_blocks(num_rows), num_blocks)
        scratch = self.scratch(num_rows * step)
        largest = torch.finfo(dtype).max
        for begin in range(0, num_blocks, step):
            tile = self.tile(which, rows[:, begin : begin + step], scratch).restore()
            if dtype == torch.float16:
                # A scale that was rounded up takes the largest numbers past float16.
                tile.clamp_(-largest, largest)
            x[:, begin * block_size : begin * block_size + tile.shape[1]] = tile
        return x

    @property
    def _page_elements(self) -> int:
        return self.layout.block_size * self.layout.head_dim


def _unpack_into(elements: torch.Tensor, packed: torch.Tensor, quantisation: Quantisation) -> None:
    """Write codes as numbers, those of fp8 in units of `FP8_UNIT`.

    Args:
        elements: float32 [..., n], written.
        packed: uint8 [..., n * element_bits / 8].
        quantisation: The format.
    """
    if quantisation.name == "int8":
        elements.copy_(packed.view(torch.int8))
    elif quantisation.name == "fp8":
        # PyTorch converts float8 one by one. A code with its sign moved to bit 15 and the rest to
        # bit 7 is the float16 of 1/256 of what it stands for. None is infinite or NaN.
        wide = packed.view(torch.int8).to(torch.int16).mul_(1 << 7).bitwise_and_(~(1 << 14))
        elements.copy_(wide.view(torch.float16))
    else:
        # Each byte b becomes the two bytes b & 15 and b >> 4, the lower address first.
        wide = packed.to(torch.int16)
        wide = wide.bitwise_or_(wide << 4).bitwise_and_(0x0F0F)
        elements.copy_(wide.view(torch.int8))
