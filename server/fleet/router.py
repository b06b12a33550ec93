"""Ray Serve's request router of the engines: `PrefixAffinity`, told of replicas and their load.

It runs where a deployment handle is, in the ingress. What it chooses by is the third argument of
`EngineReplica.generate`.
"""

import random
import time
from dataclasses import dataclass
from typing import Any

from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from headlong.server.fleet.prefix_affinity import PrefixAffinity
from headlong.server.fleet.prompt_pages import split_names
from headlong.server.fleet.request_counts import RequestCounts
from headlong.server.fleet.settings import Routing

PAGES_ARGUMENT = 2
MAX_PAGES = "max_pages"
"""What a replica says of itself: how many pages its cache can hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """How requests are routed.

    Attributes:
        routing: By what replicas are ranked.
        max_imbalance: Of `PrefixAffinity`.
    """

    routing: Routing
    max_imbalance: int


class EngineRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types for mypy
    """Ranks the replicas for every request; Ray takes the first one that has room."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Begins without any knowledge.

        Args:
            kwargs: Those of `RouterSettings`.
        """
        settings = RouterSettings(**kwargs)
        self._routing = settings.routing
        self._affinity = PrefixAffinity(settings.max_imbalance)
        self._rng = random.Random()
        self._counts = RequestCounts(time.monotonic)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks the replicas for a request, each in a rank of its own."""
        replicas = {each.replica_id.unique_id: each for each in candidate_replicas}
        pages = _pages_of(pending_request)
        if self._routing == "random":
            ranked = self._rng.sample(list(replicas), len(replicas))
        else:
            loads = {name: self._load(each.replica_id) for name, each in replicas.items()}
            ranked = self._affinity.rank(pages, loads)
        # Before it is there: the others of a burst with the same prefix are to follow it.
        if ranked and self._routing == "prefix":
            self._affinity.remember(ranked[0], pages)
        if ranked and pending_request is not None:
            self._counts.choose(ranked[0], pending_request.metadata.internal_request_id)
            pending_request.routing_context.should_backoff = True
        return [[replicas[name]] for name in ranked]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: object
    ) -> None:
        """Notes where a request went."""
        self._counts.begin(replica_id.unique_id, pending_request.metadata.internal_request_id)
        if self._routing == "prefix":
            self._affinity.remember(replica_id.unique_id, _pages_of(pending_request))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Notes that a request has ended, however it did."""
        self._counts.end(internal_request_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Learns which replicas there are, and what each can hold."""
        super().update_replicas(replicas)
        self._affinity.keep({each.replica_id.unique_id: _max_pages(each) for each in replicas})

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forgets a replica that has died."""
        super().on_replica_actor_died(replica_id)
        self._affinity.forget(replica_id.unique_id)

    def _load(self, replica_id: ReplicaID) -> int:
        # Ray's figure has what other ingresses send, and expires; ours has what is under way here.
        reported = self.replica_queue_len_cache.get(replica_id) or 0
        return max(reported, self._counts.count(replica_id.unique_id))


def _pages_of(request: PendingRequest | None) -> list[bytes]:
    if request is None or len(request.args) <= PAGES_ARGUMENT:
        return []
    names: bytes = request.args[PAGES_ARGUMENT]
    return split_names(names)


def _max_pages(replica: RunningReplica) -> int:
    metadata: dict[str, Any] = replica.replica_metadata or {}
    return int(metadata.get(MAX_PAGES, 0))
