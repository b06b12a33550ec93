"""Who waits, and whose turn it is.

Tenants share the engine by a virtual token counter each (Sheng et al., "Fairness in Serving Large
Language Models", arXiv 2401.00588): what a tenant gets is added to its counter, and the tenant with
the smallest counter is next. One that comes back after a pause starts no lower than those that
stayed, so that nobody saves up. Within a tenant the lowest priority value comes first, then the
earliest arrival. Sequences that lost their blocks were admitted once, and come before all others.
"""

from bisect import insort
from collections import Counter, deque
from collections.abc import Collection, Iterator

from headlong.server.engine.sequence import Sequence

PROMPT_WEIGHT = 1
COMPLETION_WEIGHT = 2
"""A decoded token takes a pass over the weights of its own (the paper's section 5)."""


class WaitingQueue:
    """Sequences that own no blocks."""

    def __init__(self) -> None:
        self._preempted: deque[Sequence] = deque()
        self._tenants: dict[str, list[tuple[int, int, Sequence]]] = {}
        self._served: dict[str, int] = {}
        # Sequences of each tenant that were admitted and have not left, preempted ones included.
        self._admitted: Counter[str] = Counter()
        self._arrivals = 0
        self._served_at_rest = 0

    def __len__(self) -> int:
        return len(self._preempted) + sum(map(len, self._tenants.values()))

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._preempted
        for line in self._tenants.values():
            yield from (sequence for _, _, sequence in line)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        tenant = sequence.request.tenant
        if not self._is_active(tenant):
            others = [served for each, served in self._served.items() if self._is_active(each)]
            # Where nobody is left to compare with, the last who was there.
            floor = min(others, default=self._served_at_rest)
            self._served[tenant] = max(self._served.get(tenant, 0), floor)
        self._arrivals += 1
        line = self._tenants.setdefault(tenant, [])
        # No two arrivals are equal, so sequences are never compared.
        insort(line, (sequence.request.priority, self._arrivals, sequence))

    def put_back(self, sequence: Sequence) -> None:
        """Queue a sequence that was admitted and has no blocks, before all others."""
        self._preempted.appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a waiting sequence.

        Raises:
            ValueError: It does not wait.
        """
        if sequence in self._preempted:
            self._preempted.remove(sequence)
            self.leave(sequence)
        else:
            self._take(sequence)

    def next(self, passed: Collection[Sequence]) -> Sequence | None:
        """Whose turn it is, or None.

        Args:
            passed: Sequences that cannot be admitted now.
        """
        for sequence in self._preempted:
            if sequence not in passed:
                return sequence
        for tenant in sorted(self._tenants, key=self._served.__getitem__):
            for _, _, sequence in self._tenants[tenant]:
                if sequence not in passed:
                    return sequence
        return None

    def admit(self, sequence: Sequence) -> None:
        """Take a sequence out of the queue, to run."""
        if sequence in self._preempted:
            self._preempted.remove(sequence)
        else:
            self._take(sequence)
            self.enter(sequence)

    def enter(self, sequence: Sequence) -> None:
        """Note a sequence that runs, and did not have to wait."""
        self._admitted[sequence.request.tenant] += 1

    def leave(self, sequence: Sequence) -> None:
        """Note that a sequence that was admitted is done."""
        tenant = sequence.request.tenant
        self._admitted[tenant] -= 1
        self._served_at_rest = max(self._served_at_rest, self._served[tenant])

    def charge(self, tenant: str, num_prompt_tokens: int, num_completion_tokens: int) -> None:
        """Add to what a tenant got."""
        price = num_prompt_tokens * PROMPT_WEIGHT + num_completion_tokens * COMPLETION_WEIGHT
        self._served[tenant] += price

    def _take(self, sequence: Sequence) -> None:
        line = self._tenants.get(sequence.request.tenant, [])
        for place, (_, _, waiting) in enumerate(line):
            if waiting is sequence:
                del line[place]
                return
        raise ValueError("the sequence does not wait")

    def _is_active(self, tenant: str) -> bool:
        return bool(self._tenants.get(tenant)) or self._admitted[tenant] > 0
