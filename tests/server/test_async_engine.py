"""The engine thread: streams, aborts, refusals and death."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from headlong.server.async_engine import AsyncEngine
from headlong.server.engine.engine import Engine
from headlong.server.engine.request import EngineRequest
from headlong.server.errors import ContextLengthError, EngineDeadError
from support.engines import build_engine, greedy, run

PROMPT = [10, 20, 30]


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[[str], Path]) -> Engine:
    return build_engine(tiny_model("qwen3"), max_model_len=1024)


@asynccontextmanager
async def running(engine: Engine) -> AsyncIterator[AsyncEngine]:
    async_engine = AsyncEngine(engine)
    await async_engine.start()
    try:
        yield async_engine
    finally:
        await async_engine.shutdown()


async def tokens_of(
    async_engine: AsyncEngine, name: str, prompt: list[int], count: int
) -> list[int]:
    stream = async_engine.generate(EngineRequest(name, prompt, greedy(count)))
    return [token async for output in stream for token in output.token_ids]


def test_concurrent_streams_equal_the_engine(engine: Engine) -> None:
    prompts = [[5 + index, 9, 7] for index in range(6)]
    expected = run(engine, prompts, greedy(10))

    async def scenario() -> list[list[int]]:
        async with running(engine) as async_engine:
            streams = (
                tokens_of(async_engine, str(index), prompt, 10)
                for index, prompt in enumerate(prompts)
            )
            return await asyncio.gather(*streams)

    assert asyncio.run(scenario()) == expected


def test_closing_a_stream_frees_its_blocks(engine: Engine) -> None:
    async def scenario() -> None:
        async with running(engine) as async_engine:
            stream = async_engine.generate(EngineRequest("left", PROMPT, greedy(1000)))
            await anext(stream)
            await stream.aclose()
            cancelled = asyncio.create_task(tokens_of(async_engine, "cancelled", PROMPT, 1000))
            # A whole other request comes and goes: the commands before it have been obeyed.
            await tokens_of(async_engine, "other", PROMPT, 3)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            await tokens_of(async_engine, "last", PROMPT, 3)

    asyncio.run(scenario())
    assert not engine.has_work
    assert engine.cache.owned_blocks == (0,) * len(engine.groups)
    engine.cache.check_integrity()


def test_a_refused_request_harms_nobody(engine: Engine) -> None:
    async def scenario() -> list[int]:
        async with running(engine) as async_engine:
            with pytest.raises(ContextLengthError):
                await tokens_of(async_engine, "long", [5] * 2000, 3)
            return await tokens_of(async_engine, "next", PROMPT, 3)

    assert len(asyncio.run(scenario())) == 3


def test_death_ends_every_stream(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode() -> None:
        raise RuntimeError("planted")

    async def scenario() -> None:
        async with running(engine) as async_engine:
            stream = async_engine.generate(EngineRequest("victim", PROMPT, greedy(1000)))
            await anext(stream)
            monkeypatch.setattr(engine, "step", explode)
            with pytest.raises(EngineDeadError):
                async for _ in stream:
                    pass
            await async_engine.wait_dead()
            assert not async_engine.is_alive
            with pytest.raises(EngineDeadError):
                await tokens_of(async_engine, "late", PROMPT, 3)

    asyncio.run(scenario())
    monkeypatch.undo()
    engine.abort("victim")


def test_shutdown_ends_streams(engine: Engine) -> None:
    async def scenario() -> None:
        async with running(engine) as async_engine:
            stream = async_engine.generate(EngineRequest("open", PROMPT, greedy(1000)))
            await anext(stream)
            await async_engine.shutdown()
            with pytest.raises(EngineDeadError, match="shutting down"):
                async for _ in stream:
                    pass

    asyncio.run(scenario())
    engine.abort("open")
    assert engine.cache.owned_blocks == (0,) * len(engine.groups)
