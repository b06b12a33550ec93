"""One entry that stands for all tokens that a window has left behind, on the PyTorch path.

What it computes: `reference_summaries.dropped_mean` (RazorAttention, arXiv 2407.15891). A row at
position t sees from f = t - window_size + 1 on. The sums of the block of f, and the tokens of that
block before f, are all that it dropped.
"""

from dataclasses import dataclass

import torch

from headlong.kernels.batch import GroupBatch
from headlong.kernels.layout import LayerHeads, PageLayout
from headlong.kernels.torch_logits import Logits
from headlong.kernels.torch_pages import KEYS, VALUES, GroupPages
from headlong.kernels.torch_summaries import find_blocks, read_tokens


@dataclass(frozen=True, slots=True)
class DroppedPlan:
    """What query rows have dropped; rows of one sequence share its blocks.

    Attributes:
        blocks: int64 [num_seqs * num_blocks], those that hold the first visible keys.
        used: bool [num_seqs * num_blocks, 1, block_size, 1], tokens that some row dropped.
        dropped: float32 [num_seqs, 1, num_rows, num_blocks * block_size], 1 for each row's own.
        starts: int64 [num_seqs, num_rows], the block with the sums that a row goes on from.
        counts: float32 [num_seqs, 1, num_rows, 1], tokens dropped; 1 where there are none.
        biases: float32 [num_seqs, 1, 1, num_rows, 1], ln of the tokens dropped; -inf of none.
    """

    blocks: torch.Tensor
    used: torch.Tensor
    dropped: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    biases: torch.Tensor


@dataclass(frozen=True, slots=True)
class DroppedMeans:
    """What stands for the dropped tokens of each row.

    Attributes:
        keys: float32 [num_seqs, heads, num_rows, head_dim].
        values: float32 [num_seqs, heads, num_rows, head_dim].
        biases: float32 [num_seqs, 1, 1, num_rows, 1], added to the logits.
    """

    keys: torch.Tensor
    values: torch.Tensor
    biases: torch.Tensor

    def logits(self, query: torch.Tensor, logits: Logits) -> torch.Tensor:
        """Logits of the rows' entries.

        Args:
            query: [num_seqs, heads, group_size, num_rows, head_dim].
            logits: What to make of logits.

        Returns:
            float32 [num_seqs, heads, group_size, num_rows, 1].
        """
        products = (query.float() * self.keys[:, :, None]).sum(-1, keepdim=True)
        return logits.cap(products * logits.sm_scale) + self.biases

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        """The entries' part of the result.

        Args:
            weights: [num_seqs, heads, group_size, num_rows, 1].

        Returns:
            float32 [num_seqs, heads, group_size, num_rows, head_dim].
        """
        return weights.float() * self.values[:, :, None]


def plan_dropped(
    page: PageLayout,
    tables: GroupBatch,
    seqs: torch.Tensor,
    positions: torch.Tensor,
    device: torch.device,
) -> DroppedPlan | None:
    """Work out what query rows have dropped.

    Args:
        page: The group's page layout.
        tables: The group's tables, on the CPU.
        seqs: int64 [num_seqs].
        positions: int64 [num_seqs, num_rows], of the rows, without gaps.
        device: Where the plan's tensors go.

    Returns:
        The plan; None if no row has dropped anything, or nothing stands for it.
    """
    if not page.compensated:
        return None
    block_size = page.block_size
    sink_sizes = tables.sink_sizes[seqs, None].long()
    first_visible = positions - tables.window_sizes[seqs, None].long() + 1
    counts = first_visible - sink_sizes
    some = counts > 0
    if not some.any():
        return None
    # A row without dropped tokens reads a block that it has nonetheless, one near the others'.
    logical = first_visible.maximum(positions.minimum(sink_sizes)) // block_size
    lowest = logical.amin(1, keepdim=True)
    num_blocks = int((logical - lowest).max()) + 1
    wanted = torch.minimum(lowest + torch.arange(num_blocks), logical.amax(1, keepdim=True))
    tokens = (wanted[:, :, None] * block_size + torch.arange(block_size)).flatten(1)
    begins = torch.maximum(first_visible // block_size * block_size, sink_sizes)[:, :, None]
    dropped = (tokens[:, None] >= begins) & (tokens[:, None] < first_visible[:, :, None])
    # A block that is listed again to fill up counts once.
    again = torch.arange(num_blocks) > (logical.amax(1, keepdim=True) - lowest)
    dropped &= some[:, :, None] & ~again.repeat_interleave(block_size, dim=1)[:, None]
    counts = counts.clamp(min=1).float()[:, None, :, None]
    biases = torch.where(some[:, None, :, None], counts.log(), -torch.inf)
    return DroppedPlan(
        blocks=find_blocks(tables, seqs[:, None], wanted).flatten().to(device),
        used=dropped.any(1).view(-1, 1, block_size, 1).to(device),
        dropped=dropped[:, None].float().to(device),
        starts=find_blocks(tables, seqs[:, None], logical).to(device),
        counts=counts.to(device),
        biases=biases[:, None].to(device),
    )


def dropped_means(pages: GroupPages, heads: LayerHeads, plan: DroppedPlan) -> DroppedMeans:
    """The means of what rows have dropped, for a layer's heads in the group.

    Args:
        pages: The group's pages.
        heads: The layer's heads in the group.
        plan: The rows'.
    """
    assert pages.sums is not None
    num_seqs = len(plan.starts)
    # [2, num_seqs, heads, num_rows, head_dim]
    sums = pages.sums[pages.numbers(heads, plan.starts[:, None])].permute(3, 0, 1, 2, 4)
    means: list[torch.Tensor] = []
    for which in (KEYS, VALUES):
        tokens = read_tokens(pages, heads, plan.blocks, which)
        # 0 times what an unwritten slot may hold is not 0.
        tokens = torch.where(plan.used, tokens, 0.0).view(num_seqs, -1, *tokens.shape[1:])
        tokens = tokens.transpose(1, 2).flatten(2, 3)
        means.append((sums[which] + torch.matmul(plan.dropped, tokens)) / plan.counts)
    return DroppedMeans(means[KEYS], means[VALUES], plan.biases)
