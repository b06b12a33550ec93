"""Sizes of the prefill kernel's tiles: the largest that spill next to nothing."""

from typing import NamedTuple

import torch

PLAIN_ONLY = 1
"""The set of formats of pages that are not quantised."""


class Tiles(NamedTuple):
    """Sizes of the prefill kernel's tiles.

    Attributes:
        rows: A row is a token and a query head.
        keys: Keys that are read at a time.
        code_keys: Likewise, of quantised pages.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline.
    """

    rows: int
    keys: int
    code_keys: int
    num_warps: int
    num_stages: int


def choose_tiles(
    dtype: torch.dtype, dim: int, softcap: bool, formats: int, capability: tuple[int, int]
) -> Tiles:
    """Sizes for a cache's dtype, padded head size and formats, and a device.

    The number of rows does not depend on whether there is a softcap: a step is planned without it.
    """
    if dtype == torch.float32:
        # Exact products have no matrix instruction, so registers bound the tile.
        return _FLOAT32[dim]
    if dim == 256 and formats != PLAIN_ONLY:
        # Codes take registers of their own.
        return Tiles(32, 32, 32, 8, 2)
    # The data centre's GPUs from Hopper on; others have the shared memory of Ampere or less.
    if capability[0] not in (9, 10):
        tiles = _AMPERE[dim]
        if formats == PLAIN_ONLY:
            return tiles
        # The loops of several formats share registers.
        code_keys = tiles.code_keys // 2 if formats.bit_count() > 1 else tiles.code_keys
        return tiles._replace(keys=tiles.code_keys, code_keys=code_keys)
    if softcap and dim == 256:
        return Tiles(128, 16, 16, 8, 3)
    return _HOPPER[dim]


_FLOAT32 = {
    16: Tiles(64, 32, 32, 4, 2),
    32: Tiles(32, 32, 32, 4, 2),
    64: Tiles(64, 16, 16, 8, 2),
    128: Tiles(32, 16, 16, 8, 2),
    256: Tiles(16, 16, 16, 8, 2),
}
_HOPPER = {
    16: Tiles(128, 64, 64, 4, 3),
    32: Tiles(128, 64, 64, 4, 3),
    64: Tiles(128, 128, 64, 8, 3),
    128: Tiles(128, 64, 32, 8, 3),
    256: Tiles(128, 32, 32, 8, 2),
}
_AMPERE = {
    16: Tiles(128, 64, 64, 4, 3),
    32: Tiles(128, 64, 64, 4, 3),
    64: Tiles(128, 64, 32, 8, 3),
    128: Tiles(128, 64, 32, 8, 3),
    256: Tiles(64, 32, 32, 8, 2),
}
