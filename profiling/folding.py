"""From scores of query heads to scores of the KV heads that they share."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

Fold = Literal["max", "mean"]
"""How the query heads of one KV head become one score."""


def fold_query_heads(
    scores: Sequence[Sequence[float]], num_kv_heads: int, fold: Fold
) -> tuple[tuple[float, ...], ...]:
    """Folds the scores of query heads to scores of KV heads.

    Query heads ``g * h`` to ``g * h + g - 1`` share KV head ``h``, where ``g`` is
    ``num_q_heads / num_kv_heads``: the layout of grouped-query attention in transformers.

    Args:
        scores: ``[num_layers][num_q_heads]``.
        num_kv_heads: KV heads of one layer.
        fold: ``"max"`` keeps a KV head as good as its best query head; ``"mean"`` averages.

    Returns:
        ``[num_layers][num_kv_heads]``.

    Raises:
        ValueError: If a layer's query heads do not divide evenly, or ``fold`` is neither.
    """
    if fold not in get_args(Fold):
        raise ValueError(f"fold must be one of {', '.join(get_args(Fold))}, got {fold!r}")
    if num_kv_heads < 1:
        raise ValueError(f"num_kv_heads must be at least 1, got {num_kv_heads}")
    folded: list[tuple[float, ...]] = []
    for layer, row in enumerate(scores):
        group_size, rest = divmod(len(row), num_kv_heads)
        if rest or not group_size:
            raise ValueError(
                f"layer {layer} has {len(row)} query heads, "
                f"which do not share {num_kv_heads} KV heads evenly"
            )
        groups = [row[h * group_size : (h + 1) * group_size] for h in range(num_kv_heads)]
        if fold == "max":
            folded.append(tuple(max(group) for group in groups))
        else:
            folded.append(tuple(math.fsum(group) / group_size for group in groups))
    return tuple(folded)
