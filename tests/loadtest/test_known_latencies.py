"""The load generator beside a server whose latencies are known."""

import asyncio
import random
import statistics
from itertools import pairwise
from typing import Any

import pytest
from aiohttp import web

from headlong.loadtest.arrivals import poisson
from headlong.loadtest.client import Client
from headlong.loadtest.figures import Spread, summarize
from headlong.loadtest.goodput import Goodput
from headlong.loadtest.runner import LoadResult, Plan, run_load
from headlong.loadtest.workload import Session, Turn, Workload
from support.scripted_endpoint import (
    DONE,
    MODEL,
    PATIENCE_S,
    Endpoint,
    Exchange,
    event,
    piece,
    usage,
)

TOLERANCE_MS = 150.0
"""Of a median in real time, on a machine that others use too; what is exact is tested exactly."""


class StepClock:
    """A clock that only the server moves, and that says when the client has read it."""

    def __init__(self) -> None:
        self.now = 50.0
        self.was_read = asyncio.Event()

    def __call__(self) -> float:
        self.was_read.set()
        return self.now

    async def go(self, seconds: float, exchange: Exchange, data: bytes) -> None:
        """Lets time go by, writes, and waits until the client has noted that."""
        self.now += seconds
        self.was_read.clear()
        await exchange.write(data)
        await asyncio.wait_for(self.was_read.wait(), PATIENCE_S)


def workload(count: int, **options: Any) -> Workload:
    turns = [Turn(f"prompt {index}", 4, "yes") for index in range(count)]
    return Workload("test", [Session((turn,)) for turn in turns], **options)


# Each a time to first token, and the gaps after it, in seconds; or how it fails.
SCRIPTS: list[tuple[float, ...] | int] = [
    (0.25, 0.125, 0.125),
    (0.5, 0.0625),
    429,
    (1.0, 0.25, 0.25, 0.25),
    500,
    (0.125,),
    503,
    (2.0, 0.5),
]


def drive_exactly() -> tuple[LoadResult, Endpoint]:
    async def main() -> tuple[LoadResult, Endpoint]:
        clock = StepClock()

        async def script(exchange: Exchange) -> web.StreamResponse:
            steps = SCRIPTS[exchange.number]
            if isinstance(steps, int):
                clock.now += 0.5
                return web.Response(status=steps, text="no")
            await exchange.begin()
            for index, gap in enumerate(steps):
                text = "yes " if exchange.number == 0 else "no "
                finish = "length" if index == len(steps) - 1 else None
                await clock.go(gap, exchange, piece(text, finish=finish))
            # What comes after the answer is no part of its latency.
            clock.now += 8.0
            counts = usage(100, len(steps), 25)
            await exchange.write(event({"choices": [], "usage": counts}) + DONE)
            return exchange.response

        endpoint = Endpoint(script)
        async with (
            endpoint.serving(),
            Client(endpoint.url, MODEL, timeout_s=PATIENCE_S, clock=clock) as client,
        ):
            result = await run_load(workload(len(SCRIPTS)), client, Plan(concurrency=1))
        return result, endpoint

    return asyncio.run(main())


def spread_ms(seconds: list[float]) -> Spread | None:
    return Spread.of(1e3 * each for each in seconds)


def test_every_figure_is_exactly_what_the_server_did() -> None:
    result, _ = drive_exactly()
    found = summarize(result, met=Goodput(ttft=500, tpot=125).met)
    answers = [steps for steps in SCRIPTS if not isinstance(steps, int)]
    # Of 125, 250, 500, 1000 and 2000 ms: p90 is 0.6 and p99 0.96 of the way from the last but one.
    assert found.ttft_ms is not None
    assert (found.ttft_ms.mean, found.ttft_ms.p50, found.ttft_ms.max) == (775.0, 500.0, 2000.0)
    assert (found.ttft_ms.p90, found.ttft_ms.p99) == pytest.approx((1600.0, 1960.0))
    assert found.itl_ms == spread_ms([gap for steps in answers for gap in steps[1:]])
    tpots = [sum(steps[1:]) / (len(steps) - 1) for steps in answers if len(steps) > 1]
    assert found.tpot_ms == spread_ms(tpots)
    assert found.e2e_ms == spread_ms([sum(steps) for steps in answers])
    assert found.errors == {"rejected": 2, "http": 1}
    assert (found.num_requests, found.num_completed) == (8, 5)
    assert found.num_output_tokens == sum(map(len, answers))
    assert found.num_input_tokens == 500
    assert found.cached_share == 0.25
    assert (found.accuracy, found.num_judged) == (0.2, 5)
    # The first, the second, and the answer of one token.
    assert found.goodput_share == 3 / 8
    assert found.max_concurrency == 1
    busy_s = sum(map(sum, answers)) + 3 * 0.5
    assert found.duration_s == busy_s + 8.0 * (len(answers) - 1)
    assert found.request_throughput == 5 / found.duration_s
    assert found.mean_concurrency == pytest.approx(busy_s / found.duration_s)
    assert found.generator_delay_ms == Spread(0.0, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("chat", [False, True])
def test_figures_in_real_time_are_those_of_the_servers_own_clock(chat: bool) -> None:
    rng = random.Random(7)
    waits = [(rng.uniform(0.05, 0.2), rng.uniform(0.01, 0.04)) for _ in range(16)]

    async def script(exchange: Exchange) -> web.StreamResponse:
        first_s, gap_s = waits[exchange.number]
        await exchange.begin()
        if chat:
            await exchange.write(
                event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
            )
            exchange.written.clear()
        await asyncio.sleep(first_s)
        for index in range(4):
            await exchange.write(piece("x", chat=chat, finish="length" if index == 3 else None))
            await asyncio.sleep(gap_s if index < 3 else 0.0)
        await exchange.response.write(event({"choices": [], "usage": usage(9, 4)}) + DONE)
        return exchange.response

    starts = poisson(40.0, seed=3).times(len(waits))
    endpoint = Endpoint(script)

    async def main() -> LoadResult:
        async with (
            endpoint.serving(),
            Client(endpoint.url, MODEL, timeout_s=PATIENCE_S) as client,
        ):
            return await run_load(workload(len(waits), chat=chat), client, Plan(starts))

    result = asyncio.run(main())
    found = summarize(result, asked_rate=40.0, starts_s=starts)
    assert (found.num_completed, found.errors) == (16, {})
    assert found.num_output_tokens == 64
    served = {_prompt(each): each for each in endpoint.exchanges}
    first_s: list[float] = []
    gaps_s: list[float] = []
    ends_s: list[float] = []
    for record in result.records:
        exchange = served[f"prompt {record.session}"]
        first_s.append(exchange.written[0] - exchange.received)
        ends_s.append(exchange.written[-1] - exchange.received)
        gaps_s += [after - before for before, after in pairwise(exchange.written)]
        # A cause comes before its effect, and both read one clock: never less than the server says.
        assert record.ttft_s is not None
        assert record.ttft_s >= first_s[-1]
        assert record.e2e_s >= ends_s[-1]
        assert len(record.token_times_s) == len(exchange.written) == 4
    tpots_s = [(end - first) / 3 for first, end in zip(first_s, ends_s, strict=True)]
    for figure, seconds in (
        (found.ttft_ms, first_s),
        (found.itl_ms, gaps_s),
        (found.e2e_ms, ends_s),
        (found.tpot_ms, tpots_s),
    ):
        assert figure is not None
        assert figure.p50 == pytest.approx(1e3 * statistics.median(seconds), abs=TOLERANCE_MS)


def _prompt(exchange: Exchange) -> str:
    messages = exchange.body.get("messages")
    prompt: str = exchange.body["prompt"] if messages is None else messages[-1]["content"]
    return prompt
