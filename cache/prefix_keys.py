"""Names of a sequence's full blocks: equal names mean equal K and V.

    key[-1] = SHA-256(namespace, policies, salt)
    key[i]  = SHA-256(key[i - 1], token ids of block i)

K and V of a layer depend on all tokens before and on what the layers below saw of them, so the name
covers the whole prefix and what every head group keeps.
"""

import hashlib
from array import array
from collections.abc import Sequence
from copy import copy

from headlong.cache.policy import HeadPolicy


class PrefixKeys:
    """Keys of one sequence's full blocks, extended as it grows.

    Args:
        namespace: What determines K and V beside the tokens and the policies.
        policies: What the sequence keeps of each head group.
        salt: Sequences of different salts never share a key.
        block_size: Tokens of a block.

    Attributes:
        blocks: Key of each full block.
        first_unsalted: The first block's key if there were no salt.
        policies: The policies.
        salt: The salt.
    """

    def __init__(
        self, namespace: bytes, policies: tuple[HeadPolicy, ...], salt: str, block_size: int
    ) -> None:
        identity = hashlib.sha256(namespace)
        for policy in policies:
            identity.update(array("q", (policy.sink_size, policy.window_size)).tobytes())
        self._unsalted = identity.digest()
        # Of another length than a block's tokens, so that no salt can pass for a prefix.
        secret = hashlib.sha256(salt.encode()).digest()
        self._root = _chain(self._unsalted, secret) if salt else self._unsalted
        self._block_size = block_size
        self.policies = policies
        self.salt = salt
        self.blocks: list[bytes] = []
        self.first_unsalted: bytes | None = None

    def extend(self, token_ids: Sequence[int]) -> None:
        """Name the blocks that are full by now.

        Args:
            token_ids: All tokens of the sequence so far; those named before are not read again.
        """
        size = self._block_size
        for block in range(len(self.blocks), len(token_ids) // size):
            tokens = array("q", token_ids[block * size : (block + 1) * size]).tobytes()
            if block == 0:
                self.first_unsalted = _chain(self._unsalted, tokens)
            parent = self.blocks[-1] if self.blocks else self._root
            self.blocks.append(_chain(parent, tokens))

    def copy(self) -> "PrefixKeys":
        """The same keys, to go on from there."""
        other = copy(self)
        other.blocks = list(self.blocks)
        return other


def _chain(parent: bytes, data: bytes) -> bytes:
    return hashlib.sha256(parent + data).digest()
