"""The router that Ray calls, without a cluster."""

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID

from headlong.server.fleet.prompt_pages import page_names
from headlong.server.fleet.router import MAX_PAGES, EngineRouter
from headlong.server.fleet.settings import Routing

PAGE = 4
ENGINES = DeploymentID("engine", "headlong")


def _replica(name: str, max_pages: int = 100) -> Any:
    return SimpleNamespace(
        replica_id=ReplicaID(name, ENGINES), replica_metadata={MAX_PAGES: max_pages}
    )


REPLICAS = [_replica(name) for name in "abc"]


def _request(request_id: str, tokens: range | None = None) -> Any:
    pages = b"" if tokens is None else page_names(tokens, PAGE, "")
    return SimpleNamespace(
        args=[b"request", 0.0, pages],
        metadata=SimpleNamespace(internal_request_id=request_id),
        routing_context=SimpleNamespace(should_backoff=False),
    )


def _router(monkeypatch: pytest.MonkeyPatch, routing: Routing) -> EngineRouter:
    router = EngineRouter(ENGINES, DeploymentHandleSource.REPLICA)
    router.initialize_state(routing=routing, max_imbalance=4)
    # Ray's own part asks the replicas how they do.
    monkeypatch.setattr(EngineRouter.__base__, "update_replicas", lambda *_: None)
    router.update_replicas(REPLICAS)
    return router


def _choose(router: EngineRouter, request: Any) -> list[str]:
    ranks = asyncio.run(router.choose_replicas(REPLICAS, request))
    assert all(len(rank) == 1 for rank in ranks)
    return [rank[0].replica_id.unique_id for rank in ranks]


def _end(router: EngineRouter, request_id: str) -> None:
    router.on_request_completed(REPLICAS[0].replica_id, request_id)


@pytest.mark.parametrize("routing", ["prefix", "least-loaded"])
def test_a_burst_is_spread_before_anything_is_on_its_way(
    monkeypatch: pytest.MonkeyPatch, routing: Routing
) -> None:
    router = _router(monkeypatch, routing)
    chosen = Counter(_choose(router, _request(str(each)))[0] for each in range(9))
    assert chosen == {"a": 3, "b": 3, "c": 3}


def test_a_prompt_follows_its_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    router = _router(monkeypatch, "prefix")
    first, *_ = _choose(router, _request("1", range(40)))
    # The same prefix in a burst, up to what the balance allows.
    chosen = [_choose(router, _request(str(each), range(44)))[0] for each in range(2, 8)]
    assert chosen[:4] == [first] * 4
    assert set(chosen) != {first}
    for each in range(1, 8):
        _end(router, str(each))
    assert _choose(router, _request("8", range(40)))[0] == first


def test_where_a_request_went_counts_and_not_where_it_was_to_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    router = _router(monkeypatch, "prefix")
    request = _request("1", range(40))
    first, second, _ = _choose(router, request)
    router.on_request_routed(request, ReplicaID(second, ENGINES), None)
    _end(router, "1")
    router.on_replica_actor_died(ReplicaID(first, ENGINES))
    router.update_replicas(REPLICAS)
    assert _choose(router, _request("2", range(40)))[0] == second


def test_random_is_random(monkeypatch: pytest.MonkeyPatch) -> None:
    router = _router(monkeypatch, "random")
    chosen = Counter(_choose(router, _request(str(each), range(40)))[0] for each in range(90))
    assert set(chosen) == {"a", "b", "c"}


def test_calls_without_pages_have_a_replica_too(monkeypatch: pytest.MonkeyPatch) -> None:
    router = _router(monkeypatch, "prefix")
    assert sorted(_choose(router, None)) == ["a", "b", "c"]
    info = _request("1")
    info.args = []
    assert sorted(_choose(router, info)) == ["a", "b", "c"]
