"""An engine seen from the event loop: streams, aborts, refusals, draining and death."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from headlong.server.async_engine import AsyncEngine
from headlong.server.engine.engine import Engine
from headlong.server.engine.faults import Faults
from headlong.server.engine.request import EngineRequest
from headlong.server.engine_link import EngineThread
from headlong.server.errors import (
    ContextLengthError,
    DrainingError,
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
)
from support.engines import build_engine, greedy, run
from support.observer import Recorder

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
            with pytest.raises(DrainingError, match="shutting down"):
                async for _ in stream:
                    pass
            assert async_engine.state == "dead"

    asyncio.run(scenario())
    engine.abort("open")
    assert engine.cache.owned_blocks == (0,) * len(engine.groups)


def test_its_states_and_what_they_refuse(engine: Engine) -> None:

    async def scenario() -> None:
        async_engine = AsyncEngine(engine)
        assert async_engine.state == "starting"
        with pytest.raises(EngineDeadError):
            async_engine.admit(1)
        await async_engine.start()
        assert async_engine.state == "ready"
        ticket = async_engine.admit(1)
        running_one = asyncio.create_task(tokens_of(async_engine, "running", PROMPT, 200))
        while not async_engine.stats.num_running:
            await asyncio.sleep(0)
        async_engine.drain()
        assert async_engine.state == "draining"
        assert async_engine.is_alive
        with pytest.raises(DrainingError):
            async_engine.admit(1)
        with pytest.raises(DrainingError):
            await tokens_of(async_engine, "new", PROMPT, 3)
        idle = asyncio.create_task(async_engine.wait_idle())
        # A request that was admitted before is served.
        admitted = async_engine.generate(EngineRequest("admitted", PROMPT, greedy(3)), ticket)
        assert sum([len(output.token_ids) async for output in admitted]) == 3
        assert not idle.done()
        assert len(await running_one) == 200
        await idle
        await async_engine.shutdown()
        with pytest.raises(EngineDeadError):
            async_engine.admit(1)

    asyncio.run(scenario())


def test_a_request_takes_a_place_until_it_runs(engine: Engine) -> None:
    observer = Recorder()

    async def scenario() -> None:
        async_engine = AsyncEngine(engine, max_num_queued_reqs=2, observer=observer)
        await async_engine.start()
        try:
            with async_engine.admit(2) as ticket:
                with pytest.raises(QueueFullError):
                    async_engine.admit(1)
                stream = async_engine.generate(EngineRequest("a", PROMPT, greedy(1000)), ticket)
                first = await anext(stream)
                assert (first.token_ids, first.queued_s is None) == ((), False)
                async_engine.admit(1).release()
                with pytest.raises(QueueFullError):
                    async_engine.admit(2)
                await stream.aclose()
            assert async_engine.is_idle
        finally:
            await async_engine.shutdown()

    asyncio.run(scenario())
    assert [reason for reason, *_ in observer.finished] == ["cancelled"]


def test_the_observer_hears_of_every_stage(engine: Engine) -> None:
    observer = Recorder()

    async def scenario() -> None:
        async_engine = AsyncEngine(engine, observer=observer)
        await async_engine.start()
        await tokens_of(async_engine, "r", PROMPT, 4)
        with pytest.raises(ContextLengthError):
            await tokens_of(async_engine, "long", [5] * 2000, 3)
        await async_engine.shutdown()

    asyncio.run(scenario())
    stages = ["started", "first_token", "token", "token", "token", "finished"]
    assert observer.names == stages
    assert observer.finished == [("length", 3, 4)]
    # Those of the steps, and the one with which it begins.
    assert observer.steps == sorted(observer.steps)
    assert len(set(observer.steps)) == 1 + 4


@pytest.mark.parametrize("fault", [Faults(hang_at_step=4), Faults(crash_at_step=4)])
def test_a_step_that_does_not_end_is_a_death(engine: Engine, fault: Faults) -> None:
    hangs = fault.hang_at_step is not None

    async def scenario() -> None:
        link = EngineThread(engine, fault)
        async_engine = AsyncEngine(link, hang_timeout=0.3 if hangs else 300.0)
        await async_engine.start()
        with pytest.raises(EngineDeadError, match="no step" if hangs else "unexpected"):
            await tokens_of(async_engine, "victim", PROMPT, 1000)
        await async_engine.wait_dead()
        assert async_engine.state == "dead"
        assert not async_engine.is_alive
        await async_engine.shutdown()

    asyncio.run(scenario())
    engine.abort("victim")


def test_an_idle_engine_does_not_hang(engine: Engine) -> None:
    async def scenario() -> None:
        async_engine = AsyncEngine(engine, hang_timeout=0.02)
        await async_engine.start()
        watching = asyncio.create_task(async_engine.wait_dead())
        # Ten times as long as it takes to find a hang.
        await asyncio.wait([watching], timeout=0.2)
        assert not watching.done()
        watching.cancel()
        await async_engine.shutdown()

    asyncio.run(scenario())


def test_what_cannot_be_passed_on_is_refused(engine: Engine) -> None:
    async def scenario() -> None:
        async with running(engine) as async_engine:
            with pytest.raises(InvalidRequestError):
                await tokens_of(async_engine, "big", [10**30], 3)
            assert len(await tokens_of(async_engine, "next", PROMPT, 3)) == 3

    asyncio.run(scenario())
