"""A ragged batch as the attention kernels see it: small integer tables, no Python objects."""

from dataclasses import dataclass

import torch

UNBOUNDED = 2**31 - 1
"""Window of a head that sees everything; `position - UNBOUNDED` still fits an int32."""


@dataclass(frozen=True, slots=True)
class GroupBatch:
    """One head group's blocks for every sequence of the batch.

    A table lists the blocks that are still owned, in order: first the `sink_blocks` blocks from
    token 0, then those from logical block `window_starts` on. Logical block i, the one of tokens
    i * block_size to (i + 1) * block_size - 1, is therefore entry i if i < sink_blocks, else entry
    sink_blocks + i - window_starts.

    Attributes:
        block_tables: int32 [num_seqs, max_blocks]; entries past a sequence's own are 0.
        table_lens: int32 [num_seqs], entries of each table.
        sink_blocks: int32 [num_seqs].
        window_starts: int32 [num_seqs].
        sink_sizes: int32 [num_seqs], tokens.
        window_sizes: int32 [num_seqs], tokens; `UNBOUNDED` for a retrieval head.
        slot_mapping: int64 [total_tokens], block * block_size + offset of each new token.
    """

    block_tables: torch.Tensor
    table_lens: torch.Tensor
    sink_blocks: torch.Tensor
    window_starts: torch.Tensor
    sink_sizes: torch.Tensor
    window_sizes: torch.Tensor
    slot_mapping: torch.Tensor


@dataclass(frozen=True, slots=True)
class SelectionSettings:
    """How retrieval heads choose pages, beside what a batch says.

    Attributes:
        budget_tokens: Most tokens of any sequence's budget that is not unbounded.
        num_places: Sequences whose choices are remembered at once.
        max_context: Longest context in tokens.
        min_similarity: A choice is renewed when the cosine of the query and the one that it was
            made for is below this for any query head of a KV head; None does not look.
    """

    budget_tokens: int
    num_places: int
    max_context: int
    min_similarity: float | None = None


@dataclass(frozen=True, slots=True)
class SelectionBatch:
    """How much of its context each sequence's one new token may read, page by page.

    It concerns groups whose pages are summarised and sequences with one new token. What was chosen
    is remembered under the sequence's place, so that later tokens may reuse it.

    Attributes:
        budgets: int32 [num_seqs], tokens; `UNBOUNDED` where all are read.
        places: int32 [num_seqs], less than the backend's `SelectionSettings.num_places`, no two
            alike; 0 where all are read.
        renews: bool [num_seqs], whether the sequence has to choose anew.
    """

    budgets: torch.Tensor
    places: torch.Tensor
    renews: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Prefill chunks and decodes side by side.

    New tokens of sequence s are rows cu_seqlens_q[s] to cu_seqlens_q[s + 1] - 1 of the packed
    batch and have positions context_lens[s] - (number of new tokens) to context_lens[s] - 1.

    Attributes:
        cu_seqlens_q: int32 [num_seqs + 1], running sum of new tokens, from 0.
        context_lens: int32 [num_seqs], tokens of each sequence with the new ones.
        groups: One entry a head group.
        selection: What of its pages each sequence reads; None if all read all.
    """

    cu_seqlens_q: torch.Tensor
    context_lens: torch.Tensor
    groups: tuple[GroupBatch, ...]
    selection: SelectionBatch | None = None
