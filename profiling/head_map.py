"""A model's heads as text: which retrieve and which stream."""

from collections.abc import Sequence

RETRIEVAL_MARK = "●"
STREAMING_MARK = "·"


def head_map_lines(labels: Sequence[Sequence[bool]]) -> list[str]:
    r"""Draws one line a layer, one mark a KV head.

    Args:
        labels: ``[num_layers][num_kv_heads]``, true for a retrieval head.

    Returns:
        As many lines as layers: the layer, its marks, and how many of its heads retrieve.

    Example:
        >>> print(*head_map_lines([[True, False], [False, False]]), sep="\n")
        layer 0  ● ·  1
        layer 1  · ·  0
    """
    width = len(str(len(labels) - 1))
    return [
        f"layer {layer:>{width}}  "
        f"{' '.join(RETRIEVAL_MARK if label else STREAMING_MARK for label in row)}  {sum(row)}"
        for layer, row in enumerate(labels)
    ]


def head_summary(labels: Sequence[Sequence[bool]]) -> str:
    """Counts the heads in one line: ``"128 of 256 KV heads retrieve, 128 stream (50.0 %)"``.

    Args:
        labels: ``[num_layers][num_kv_heads]``, true for a retrieval head.
    """
    num_heads = sum(len(row) for row in labels)
    num_retrieval = sum(sum(row) for row in labels)
    num_streaming = num_heads - num_retrieval
    share = num_streaming / num_heads if num_heads else 0.0
    return f"{num_retrieval} of {num_heads} KV heads retrieve, {num_streaming} stream ({share:.1%})"
