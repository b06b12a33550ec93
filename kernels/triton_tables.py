"""Where the heads of each layer lie, as small tables on the device; they never change.

`triton_pages` lists their fields.
"""

from dataclasses import dataclass

import torch

from headlong.kernels.layout import SECTION_ALIGNMENT_BYTES, ArenaLayout
from headlong.kernels.triton_codes import page_format


@dataclass(frozen=True, slots=True)
class LayerTables:
    """The KV heads of one layer.

    Attributes:
        group_heads: int32 [num_groups, 4]: number of heads, index of the first in `order`, page
            of the first in the group's blocks, 0.
        order: int32 [num_kv_heads], KV heads group by group.
        group_of: int32 [num_kv_heads, 2]: group of each KV head, index among the layer's in it.
    """

    group_heads: torch.Tensor
    order: torch.Tensor
    group_of: torch.Tensor


def build_group_table(layout: ArenaLayout, device: torch.device) -> torch.Tensor:
    """Where each group's pages and their sections lie, int64 [num_groups, 9]."""
    rows = [
        (
            *(
                offset // SECTION_ALIGNMENT_BYTES
                for offset in (
                    base,
                    page.page_bytes,
                    page.values_at,
                    page.scales_at,
                    page.minima_at,
                    page.bounds_at,
                    page.sums_at,
                )
            ),
            block_pages,
            page_format(page),
        )
        for base, block_pages, page in zip(
            layout.group_bases, layout.group_pages, layout.pages, strict=True
        )
    ]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def build_layer_tables(layout: ArenaLayout, device: torch.device) -> tuple[LayerTables, ...]:
    """One entry a layer."""
    tables: list[LayerTables] = []
    for layer in layout.layers:
        order = [head for heads in layer for head in heads.kv_heads]
        group_heads = torch.zeros(layout.num_groups, 4, dtype=torch.int32)
        group_of = torch.zeros(len(order), 2, dtype=torch.int32)
        first = 0
        for heads in layer:
            count = len(heads.kv_heads)
            group_heads[heads.group] = torch.tensor([count, first, heads.first_page, 0])
            for index, head in enumerate(heads.kv_heads):
                group_of[head] = torch.tensor([heads.group, index])
            first += count
        tables.append(
            LayerTables(
                group_heads=group_heads.to(device),
                order=torch.tensor(order, dtype=torch.int32, device=device),
                group_of=group_of.to(device),
            )
        )
    return tuple(tables)
