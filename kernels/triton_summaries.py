"""What pages say of their keys, on the GPU path: bounds and sums, brought up to date after append.

Pages that know them are of one group each, so a launch is of one group and its format. Padding of a
step has no context and writes nothing: a CUDA graph holds the launches.
"""

import torch
import triton

from headlong.kernels.layout import SPAN_BLOCKS, ArenaLayout
from headlong.kernels.triton_bounds import update_bounds
from headlong.kernels.triton_codes import page_format
from headlong.kernels.triton_plan import StepShape, TritonPlan
from headlong.kernels.triton_sums import update_sums


class TritonSummaries:
    """The launches that follow an append, for the groups whose pages know bounds or sums.

    Args:
        arena: uint8 [total_bytes].
        layout: The arena's map.
        groups: int64 [num_groups, 9], see `triton_pages`.
    """

    def __init__(self, arena: torch.Tensor, layout: ArenaLayout, groups: torch.Tensor) -> None:
        self._arena = arena
        self._layout = layout
        self._groups = groups

    def update(self, layer: int, group_heads: torch.Tensor, plan: TritonPlan) -> None:
        """Bring a layer's summaries up to date; its new K and V are written.

        Args:
            layer: Which layer's heads.
            group_heads: int32 [num_groups, 4], of the layer.
            plan: The step's.
        """
        places = self._groups, group_heads, plan.rows, plan.tables, plan.lists
        for heads in self._layout.layers[layer]:
            page, num_heads = self._layout.pages[heads.group], len(heads.kv_heads)
            of_page = page.dtype, page.head_dim, page.block_size, page_format(page)
            if page.summarised:
                num_spans = _most_spans(plan.shape, page.block_size)
                update_bounds(self._arena, *places, heads.group, num_heads, num_spans, *of_page)
            if page.compensated:
                update_sums(self._arena, *places, heads.group, num_heads, *of_page)


def _most_spans(shape: StepShape, block_size: int) -> int:
    """Bound of the spans that any sequence's new tokens lie in."""
    if shape.num_tiles == 0:
        return 1
    return int(triton.cdiv(shape.num_tokens, SPAN_BLOCKS * block_size)) + 1
