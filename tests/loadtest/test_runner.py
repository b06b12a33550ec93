import asyncio
import heapq
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import pytest

from headlong.loadtest.client import Client, Request
from headlong.loadtest.records import RequestRecord
from headlong.loadtest.runner import LoadResult, Plan, run_load
from headlong.loadtest.workload import Message, Session, Turn, Workload


class FakeTime:
    """A clock that stands still until everybody waits, and then goes on to the next alarm."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._alarms: list[tuple[float, int, asyncio.Event]] = []
        self._order = count()

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        alarm = asyncio.Event()
        heapq.heappush(self._alarms, (self.now + seconds, next(self._order), alarm))
        await alarm.wait()

    async def go(self, until: asyncio.Future[Any]) -> None:
        while not until.done():
            # Whoever can go on does so before time does.
            for _ in range(20):
                await asyncio.sleep(0)
            if self._alarms and not until.done():
                self.now, _, alarm = heapq.heappop(self._alarms)
                alarm.set()


class FakeClient(Client):
    """Answers with a text after as many seconds as it is told."""

    def __init__(
        self, time: FakeTime, took_s: Callable[[int], float], fails: Sequence[int] = ()
    ) -> None:
        super().__init__("http://fake", "fake", clock=time)
        self._time = time
        self._took_s = took_s
        self._fails = fails
        self.requests: list[Request] = []
        self.in_flight = 0
        self.most_in_flight = 0

    async def send(
        self,
        request: Request,
        *,
        session: int = 0,
        turn: int = 0,
        scheduled_s: float | None = None,
        start_s: float = 0.0,
    ) -> RequestRecord:
        number = len(self.requests)
        prompt = request.prompt
        self.requests.append(
            Request(prompt if isinstance(prompt, str) else list(prompt), request.max_tokens)
        )
        sent = self.clock()
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await self._time.sleep(self._took_s(number))
        finally:
            self.in_flight -= 1
        ended = self.clock() - start_s
        return RequestRecord(
            session=session,
            turn=turn,
            scheduled_s=sent - start_s if scheduled_s is None else scheduled_s,
            sent_s=sent - start_s,
            token_times_s=(ended,),
            finished_s=ended,
            num_prompt_tokens=5,
            num_completion_tokens=1,
            num_cached_tokens=None,
            text=f"answer {number}",
            error="http" if number in self._fails else None,
        )


def play(
    workload: Workload,
    plan: Plan,
    took_s: Callable[[int], float] = lambda _: 1.0,
    *,
    fails: Sequence[int] = (),
    stop_at_s: float | None = None,
    **options: Any,
) -> tuple[LoadResult, FakeClient]:
    async def main() -> tuple[LoadResult, FakeClient]:
        time = FakeTime()
        client = FakeClient(time, took_s, fails)
        stop = asyncio.Event()

        async def interrupt(seconds: float) -> None:
            await time.sleep(seconds)
            stop.set()

        running = asyncio.ensure_future(
            run_load(workload, client, plan, stop=stop, sleep=time.sleep, **options)
        )
        stopping = None if stop_at_s is None else asyncio.ensure_future(interrupt(stop_at_s))
        await time.go(running)
        if stopping is not None:
            stopping.cancel()
        assert client.in_flight == 0
        return running.result(), client

    return asyncio.run(main())


def single(number: int, **options: Any) -> Workload:
    sessions = [Session((Turn(f"prompt {index}", 4),)) for index in range(number)]
    return Workload("test", sessions, **options)


def test_an_open_loop_does_not_wait_for_answers() -> None:
    starts = [0.0, 0.5, 0.5, 2.0]
    result, client = play(single(4), Plan(starts), lambda _: 100.0)
    records = sorted(result.records, key=lambda record: record.session)
    assert [record.sent_s for record in records] == starts
    assert [record.scheduled_s for record in records] == starts
    assert client.most_in_flight == 4
    assert result.duration_s == 102.0


def test_a_limit_on_what_is_in_flight_holds_back_in_order() -> None:
    result, client = play(single(4), Plan([0.0, 0.1, 0.2, 0.3], concurrency=2))
    assert client.most_in_flight == 2
    found = [(each.session, each.scheduled_s, each.sent_s) for each in result.records]
    # Held back by the limit, and not by the generator.
    expected = [(0, 0.0, 0.0), (1, 0.1, 0.1), (2, 1.0, 1.0), (3, 1.1, 1.1)]
    assert found == [pytest.approx(each) for each in expected]


def test_in_a_closed_loop_each_client_sends_when_its_last_request_has_ended() -> None:
    took = [3.0, 1.0, 1.0, 1.0, 1.0]
    result, client = play(single(5), Plan(concurrency=2), lambda number: took[number])
    sent = {record.session: record.sent_s for record in result.records}
    assert sent == {0: 0.0, 1: 0.0, 2: 1.0, 3: 2.0, 4: 3.0}
    assert client.most_in_flight == 2
    assert result.duration_s == 4.0


def test_more_clients_than_sessions() -> None:
    result, client = play(single(2), Plan(concurrency=9))
    assert client.most_in_flight == len(result.records) == 2


def chat(history: tuple[Message, ...] = ()) -> Workload:
    turns = Turn("first", 4, "answer 0"), Turn("second", 4, "elsewhere"), Turn("third", 4)
    return Workload("test", [Session(turns, history=history)], chat=True)


def test_turns_of_a_chat_bring_their_history_along() -> None:
    system = Message("system", "Be brief")
    result, client = play(chat((system,)), Plan(concurrency=1))
    first = [system, Message("user", "first")]
    second = [*first, Message("assistant", "answer 0"), Message("user", "second")]
    third = [*second, Message("assistant", "answer 1"), Message("user", "third")]
    assert [request.prompt for request in client.requests] == [first, second, third]
    assert [record.correct for record in result.records] == [True, False, None]
    # A turn is due when the one before has ended, in an open loop too.
    assert [record.scheduled_s for record in result.records] == [0.0, 1.0, 2.0]


def test_turns_of_completions_are_alone() -> None:
    workload = Workload("test", [Session((Turn("first", 4), Turn("second", 4)))])
    _, client = play(workload, Plan(concurrency=1))
    assert [request.prompt for request in client.requests] == ["first", "second"]


def test_a_failed_turn_ends_its_session() -> None:
    told: list[tuple[int, int, str]] = []
    result, client = play(
        chat(), Plan([0.0]), fails=[0], progress=lambda *values: told.append(values)
    )
    assert len(client.requests) == 1
    assert result.num_not_sent == 2
    # What failed is not judged.
    assert result.records[0].correct is None
    assert told == [(0, 3, "0 in flight"), (3, 3, "0 in flight, 1 failed")]


def test_the_warm_up_is_over_before_the_test_begins() -> None:
    warm_up = [Session((Turn("warm", 4),))] * 3
    result, client = play(single(2), Plan(concurrency=2), warm_up=warm_up)
    assert [request.prompt for request in client.requests[:3]] == ["warm"] * 3
    assert client.most_in_flight == 2
    marked = [(each.warm_up, each.sent_s, each.finished_s) for each in result.records]
    assert marked == [
        (True, -2.0, -1.0),
        (True, -2.0, -1.0),
        (True, -1.0, 0.0),
        (False, 0.0, 1.0),
        (False, 0.0, 1.0),
    ]
    assert result.num_not_sent == 0


def test_an_interruption_keeps_what_has_ended() -> None:
    result, _ = play(single(5), Plan([0.0, 1.0, 2.0, 3.0, 9.0]), lambda _: 1.5, stop_at_s=3.25)
    assert result.interrupted
    assert [record.session for record in result.records] == [0, 1]
    assert (result.num_cut, result.num_not_sent) == (2, 1)
    assert result.duration_s == 3.25


def test_an_interruption_of_the_warm_up_sends_nothing_more() -> None:
    warm_up = [Session((Turn("warm", 4),))] * 3
    result, client = play(single(2), Plan(concurrency=1), warm_up=warm_up, stop_at_s=1.5)
    assert result.interrupted
    assert len(client.requests) == 2
    assert result.num_not_sent == 2
    assert [record.warm_up for record in result.records] == [True]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"concurrency": 0}, "concurrency must be 1 or more, got 0"),
        ({}, "a closed loop needs a concurrency"),
    ],
)
def test_a_plan_that_cannot_be(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**plan)


def test_each_session_needs_its_start() -> None:
    with pytest.raises(ValueError, match="3 starts are planned for 2 sessions"):
        play(single(2), Plan([0.0, 1.0, 2.0]))
