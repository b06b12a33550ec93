"""Which replica should have a request: the one with most of its prompt, if it is not too busy.

Prompts are known by the names of their pages (`prompt_pages`). A replica should have a page if a
prompt with it went there, and not too many others since: what is remembered of a replica is bounded
by what its cache can hold.
"""

import random
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256

from headlong.server.fleet.prompt_pages import NAME_BYTES


class PrefixAffinity:
    """Remembers which pages each replica has, and ranks replicas for a prompt.

    Of a prompt's pages, the first is always the most recently used one, so that a replica's last
    pages are forgotten before those that they rest on: what it knows of a prompt is a prefix.

    Args:
        max_imbalance: Requests that a replica may have more than the least busy one and still be
            preferred for what it holds.
        rng: Chooses among replicas that are equal.
    """

    def __init__(self, max_imbalance: int, rng: random.Random | None = None) -> None:
        self._max_imbalance = max_imbalance
        self._rng = random.Random() if rng is None else rng
        self._max_pages: dict[str, int] = {}
        self._pages: dict[str, OrderedDict[bytes, None]] = {}

    def keep(self, max_pages: Mapping[str, int]) -> None:
        """Learn which replicas there are; the others are forgotten.

        Args:
            max_pages: Pages that each one's cache can hold.
        """
        self._max_pages = dict(max_pages)
        self._pages = {
            replica: self._pages.get(replica, OrderedDict()) for replica in self._max_pages
        }
        for replica in self._pages:
            self._forget_oldest(replica)

    def forget(self, replica: str) -> None:
        """Forget a replica that has died."""
        self._max_pages.pop(replica, None)
        self._pages.pop(replica, None)

    def num_held(self, replica: str, pages: Sequence[bytes]) -> int:
        """Counts the first pages of a prompt that a replica should have."""
        held: Mapping[bytes, None] = self._pages.get(replica, {})
        low, high = 0, len(pages)
        while low < high:
            middle = (low + high + 1) // 2
            if pages[middle - 1] in held:
                low = middle
            else:
                high = middle - 1
        return low

    def rank(self, pages: Sequence[bytes], loads: Mapping[str, int]) -> list[str]:
        """Orders replicas, the best one first.

        Those come first whose load is at most `max_imbalance` over the least; among these, those
        that hold more of the prompt; then those with less load. Between replicas that are still
        equal the first page decides: several routers that know nothing of each other send it to the
        same one.

        Args:
            pages: Of the prompt.
            loads: Requests that each replica has.
        """
        most = min(loads.values(), default=0) + self._max_imbalance
        first = pages[0] if pages else self._rng.randbytes(NAME_BYTES)

        def key(replica: str) -> tuple[bool, int, int, bytes]:
            load = loads[replica]
            mixed = sha256(first + replica.encode()).digest()
            return load > most, -self.num_held(replica, pages), load, mixed

        return sorted(loads, key=key)

    def remember(self, replica: str, pages: Iterable[bytes]) -> None:
        """Note that a prompt goes to a replica."""
        held = self._pages.get(replica)
        if held is None:
            return
        for page in reversed(list(pages)):
            held[page] = None
            held.move_to_end(page)
        self._forget_oldest(replica)

    def _forget_oldest(self, replica: str) -> None:
        held = self._pages[replica]
        while len(held) > self._max_pages[replica]:
            held.popitem(last=False)
