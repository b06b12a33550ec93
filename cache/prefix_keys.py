"""Names of a sequence's full blocks: equal names mean equal K and V.

    key[-1] = SHA-256(namespace, policies, salt)
    key[i]  = SHA-256(key[i - 1], token ids of block i)

K and V of a layer depend on all tokens before and on what the layers below saw of them, so the name
covers the whole prefix and what every head group keeps. Where tokens from some position on see less
than a prompt's would, it covers that position too, from the first block on that has such a token:

    key[i]  = SHA-256(SHA-256(key[i - 1], position), token ids of block i)
"""

import hashlib
from collections.abc import Sequence
from copy import copy

import numpy as np

from headlong.cache.policy import HeadPolicy


class PrefixKeys:
    """Keys of one sequence's full blocks, extended as it grows.

    Args:
        namespace: What determines K and V beside the tokens and the policies.
        policies: What the sequence keeps of each head group.
        salt: Sequences of different salts never share a key.
        block_size: Tokens of a block.
        dense_tokens: First tokens that see all that the policies let them see, as if they were a
            prompt's; None if all do.

    Attributes:
        blocks: Key of each full block.
        first_unsalted: The first block's key if there were no salt.
        policies: The policies.
        salt: The salt.
    """

    def __init__(
        self,
        namespace: bytes,
        policies: tuple[HeadPolicy, ...],
        salt: str,
        block_size: int,
        dense_tokens: int | None = None,
    ) -> None:
        # Every part but the last is preceded by its length or has a fixed one, so that no two
        # sets of parts read the same.
        identity = _number(len(namespace)) + namespace + _number(len(policies))
        for policy in policies:
            identity += _number(policy.sink_size) + _number(policy.window_size)
        self._unsalted = hashlib.sha256(identity).digest()
        # JSON can carry half of a surrogate pair.
        secret = salt.encode("utf-8", "surrogatepass")
        self._root = hashlib.sha256(identity + secret).digest()
        self._block_size = block_size
        self._dense_tokens = dense_tokens
        self.policies = policies
        self.salt = salt
        self.blocks: list[bytes] = []
        self.first_unsalted: bytes | None = None

    def extend(self, token_ids: Sequence[int]) -> None:
        """Name the blocks that are full by now.

        Args:
            token_ids: All tokens of the sequence so far; those named before are not read again, and
                keep their names if they are missing.
        """
        first, last = len(self.blocks), len(token_ids) // self._block_size
        if last <= first:
            return
        tokens = token_ids[first * self._block_size : last * self._block_size]
        data = np.asarray(tokens, dtype="<i8").tobytes()
        stride = len(data) // (last - first)
        if first == 0:
            self.first_unsalted = _chain(self._unsalted, data[:stride])
        key = self.blocks[-1] if self.blocks else self._root
        dense = self._dense_tokens
        for index in range(first, last):
            if dense is not None and index == dense // self._block_size:
                # 13 bytes: the tokens of a block are never as many.
                key = _chain(key, b"dense" + _number(dense))
            start = (index - first) * stride
            key = _chain(key, data[start : start + stride])
            self.blocks.append(key)

    def copy(self) -> "PrefixKeys":
        """The same keys, to go on from there."""
        other = copy(self)
        other.blocks = list(self.blocks)
        return other


def _chain(parent: bytes, data: bytes) -> bytes:
    return hashlib.sha256(parent + data).digest()


def _number(value: int) -> bytes:
    return value.to_bytes(8, "little")
