"""What a replica does with requests, without a cluster."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from headlong.demo.paths import MODEL_DIR
from headlong.server.async_engine import AsyncEngine
from headlong.server.config import ServerConfig
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.messages import Refused, Report
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampling_params import SamplingParams
from headlong.server.fleet import replica as ray_replica
from headlong.server.fleet.messages import decode_told
from headlong.server.fleet.replica import EngineReplica
from support.engines import build_engine

INGRESS = "one"


@asynccontextmanager
async def _running(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EngineReplica]:
    engine = AsyncEngine(build_engine(MODEL_DIR, max_model_len=256, kv_cache_memory_bytes=8 << 20))
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r"))
    monkeypatch.setattr(ray_replica.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(ray_replica, "start_engine", lambda *_, **__: engine)
    monkeypatch.setattr(ray_replica, "configure_logs", lambda _: None)
    replica = EngineReplica.__new__(EngineReplica)
    await EngineReplica.__init__(  # type: ignore[misc]
        replica, EngineConfig(model="m"), ServerConfig()
    )
    try:
        yield replica
    finally:
        await engine.shutdown()


def _generate(
    replica: EngineReplica, request_id: str, max_tokens: int, prompt_len: int = 3
) -> AsyncGenerator[bytes, None]:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    request = msgspec.msgpack.encode(EngineRequest(request_id, [5] * prompt_len, params))
    return replica.generate(request, 0.0, b"", INGRESS)


def _events(messages: list[bytes]) -> list[Any]:
    told = [decode_told(message) for message in messages]
    assert {each.replica for each in told} <= {"r"}
    return [each.event for each in told]


def test_a_request_is_streamed_and_a_bad_one_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with _running(monkeypatch) as replica:
            good = _events([each async for each in _generate(replica, "a", 3)])
            assert all(isinstance(each, Report) for each in good)
            outputs = [output for each in good for output in each.outputs]
            assert sum(len(each.token_ids) for each in outputs) == 3
            assert outputs[-1].finish_reason == "length"
            (bad,) = _events([each async for each in _generate(replica, "b", 3, 999)])
            assert isinstance(bad, Refused)
            assert bad.fault.kind == "ContextLengthError"

    asyncio.run(scenario())


def test_it_names_no_process_of_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with _running(monkeypatch) as replica:
            (ready,) = _events([await replica.info()])
            assert ready.info.max_model_len == 256
            assert ready.info.pid is None

    asyncio.run(scenario())


def test_what_a_lost_ingress_asked_for_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with _running(monkeypatch) as replica:
            stream = _generate(replica, "a", 200)
            await anext(stream)
            await replica.stats("another")
            await anext(stream)
            monkeypatch.setattr(ray_replica, "SILENT_S", -1.0)
            assert [each async for each in stream] == []
            while _events([await replica.stats(INGRESS)])[0].stats.num_running:
                await asyncio.sleep(0.01)
            stats = _events([await replica.stats(INGRESS)])[0].stats
            assert stats.generation_tokens_total < 200

    asyncio.run(scenario())
