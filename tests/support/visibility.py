"""The visibility law, stated once more and without arithmetic on blocks."""

from headlong.cache.policy import HeadPolicy


def is_visible(policy: HeadPolicy, query: int, key: int) -> bool:
    if key > query:
        return False
    return key < policy.sink_size or key > query - policy.window_size


def reachable(policy: HeadPolicy, first_query: int, num_tokens: int) -> list[int]:
    """Positions below `num_tokens` that some query from `first_query` on sees."""
    # As the query moves on the window only loses keys, and until a key's own position it is unseen.
    return [key for key in range(num_tokens) if is_visible(policy, max(first_query, key), key)]
