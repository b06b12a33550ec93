"""Which rank computes which KV heads: as many on every rank, retrieval heads shared out.

A retrieval head keeps the whole context and reads it in every step; a streaming head does neither.
With heads dealt as they come, one rank may hold most of the retrieval heads: its memory bounds the
context, and the others wait for it in every layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HeadDealing:
    """The KV heads of every rank.

    Attributes:
        heads: [num_layers][num_ranks], the heads of a layer that a rank computes, sorted; together
            they are all heads of the layer, each once.
    """

    heads: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def num_ranks(self) -> int:
        """Number of ranks."""
        return len(self.heads[0])

    def order(self, layer: int) -> tuple[int, ...]:
        """The heads of a layer, those of rank 0 first: rank r's are the r-th of equal slices."""
        return tuple(head for dealt in self.heads[layer] for head in dealt)

    def members(self, rank: int) -> dict[tuple[int, int], int]:
        """A rank's heads: (layer, KV head) to the head's index among the rank's of that layer."""
        return {
            (layer, head): index
            for layer, ranks in enumerate(self.heads)
            for index, head in enumerate(ranks[rank])
        }


@dataclass(frozen=True, slots=True)
class HeadShare:
    """The heads of one rank.

    Attributes:
        dealing: Those of all ranks.
        rank: Which one.
    """

    dealing: HeadDealing
    rank: int


def deal_heads(retrieval: Sequence[Sequence[bool]], num_ranks: int) -> HeadDealing:
    """Deal the KV heads of every layer to ranks.

    A rank gets the rounded-down share of a layer's retrieval heads; those left over go one each to
    the ranks that have the fewest so far. Therefore no two ranks differ by more than one retrieval
    head, neither in a layer nor over the layers up to any.

    Args:
        retrieval: [num_layers][num_kv_heads], True for a head that keeps everything.
        num_ranks: Ranks; the number of heads of a layer is a multiple of it.

    Returns:
        The dealing; the same for the same arguments, so that every rank may work it out.

    Raises:
        ValueError: There are no layers, or a layer's heads cannot be dealt evenly.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be at least 1, got {num_ranks}")
    if not retrieval:
        raise ValueError("retrieval must have at least one layer")
    totals = [0] * num_ranks
    layers: list[tuple[tuple[int, ...], ...]] = []
    for layer, labels in enumerate(retrieval):
        if not labels or len(labels) % num_ranks:
            raise ValueError(
                f"the {len(labels)} KV heads of layer {layer} cannot be dealt to {num_ranks} ranks"
            )
        keeping = [head for head, keeps_all in enumerate(labels) if keeps_all]
        passing = [head for head, keeps_all in enumerate(labels) if not keeps_all]
        share, left_over = divmod(len(keeping), num_ranks)
        poorest = sorted(range(num_ranks), key=totals.__getitem__)[:left_over]
        dealt: list[tuple[int, ...]] = []
        for rank in range(num_ranks):
            count = share + (rank in poorest)
            totals[rank] += count
            others = len(labels) // num_ranks - count
            dealt.append(tuple(sorted(keeping[:count] + passing[:others])))
            keeping, passing = keeping[count:], passing[others:]
        layers.append(tuple(dealt))
    return HeadDealing(tuple(layers))
