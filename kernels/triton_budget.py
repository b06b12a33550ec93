"""What the GPU path plans of page selection: who chooses, and how much that leaves to read."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headlong.kernels.batch import UNBOUNDED, AttentionBatch

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class ChoosingGroup:
    """The head group whose pages are chosen.

    Attributes:
        group: Its index.
        block_size: Tokens of a page.
        budget_pages: Most pages that a head of any sequence reads.
    """

    group: int
    block_size: int
    budget_pages: int


def pack_choices(
    batch: AttentionBatch, order: npt.NDArray[np.int64], choosing: ChoosingGroup | None
) -> Ints:
    """What `triton_choice` calls choices.

    Args:
        batch: The batch, on the CPU.
        order: Sequences in the order of the step.
        choosing: Whose pages are chosen; None if nobody's.

    Returns:
        int32 [num_seqs, 4]: pages that are read, 0 for all; place; renews; 0.

    Raises:
        ValueError: A budget is larger than the choosing group's.
    """
    choices = np.zeros((len(order), 4), dtype=np.int32)
    if batch.selection is None or choosing is None:
        return choices
    budgets = batch.selection.budgets.numpy()[order]
    pages = budgets // choosing.block_size
    num_pages = -(-batch.context_lens.numpy()[order] // choosing.block_size)
    decodes = np.diff(batch.cu_seqlens_q.numpy())[order] == 1
    keeps_all = batch.groups[choosing.group].window_sizes.numpy()[order] == UNBOUNDED
    bounded = (budgets < UNBOUNDED) & (num_pages > pages) & decodes & keeps_all
    if pages[bounded].max(initial=0) > choosing.budget_pages:
        raise ValueError(
            f"budgets must be at most {choosing.budget_pages} pages, got {pages[bounded].max()}"
        )
    choices[:, 0] = pages
    choices[:, 1] = batch.selection.places.numpy()[order]
    choices[:, 2] = batch.selection.renews.numpy()[order]
    choices[~bounded] = 0
    return choices


def contexts_read(contexts: Ints, choices: Ints, block_size: int) -> Ints:
    """Tokens of the pages that each sequence reads: all of them are full but the newest."""
    num_pages = -(-contexts // block_size)
    left_out = np.where(choices[:, 0] > 0, num_pages - choices[:, 0], 0)
    read: Ints = (contexts - left_out * block_size).astype(np.int32)
    return read
