"""Drives a workload against an endpoint: open loop at planned times, or closed loop by clients.

In an open loop requests come when the plan says, however slow the answers are, as from users who
do not know of each other. In a closed loop a fixed number of clients each send the next request
when their last has ended, so that a slow server is asked less. The first shows what users would
see at a rate; the second what a server can do.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace

from headlong.loadtest.client import Client, Request
from headlong.loadtest.records import RequestRecord
from headlong.loadtest.workload import Message, Session, Workload
from headlong.profiling.progress import Progress, no_progress
from headlong.profiling.tasks.task import is_named

Sleep = Callable[[float], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Plan:
    """When sessions begin.

    Attributes:
        starts_s: Of each session, seconds after the test's start, in order: an open loop. None is
            a closed loop.
        concurrency: In a closed loop how many clients there are. In an open loop the most requests
            in flight, or None for no limit; a request that such a limit holds back is due when it
            is let through, so that the wait is neither the server's nor the generator's.
    """

    starts_s: Sequence[float] | None = None
    concurrency: int | None = None

    def __post_init__(self) -> None:
        if self.concurrency is not None and self.concurrency < 1:
            raise ValueError(f"concurrency must be 1 or more, got {self.concurrency}")
        if self.starts_s is None and self.concurrency is None:
            raise ValueError("a closed loop needs a concurrency")


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What came of a test.

    Attributes:
        records: Of each request that has ended, in the order of their ends; those of the warm-up,
            which are marked, have times before 0.
        duration_s: From the start to the end of the last request, or to the interruption.
        num_cut: Requests in flight when the test was interrupted; they have no record.
        num_not_sent: Turns that were not sent: their session had failed, or the test was
            interrupted.
        interrupted: Whether the test was ended before its time.
    """

    records: tuple[RequestRecord, ...]
    duration_s: float
    num_cut: int = 0
    num_not_sent: int = 0
    interrupted: bool = False


async def run_load(
    workload: Workload,
    client: Client,
    plan: Plan,
    *,
    warm_up: Sequence[Session] = (),
    stop: asyncio.Event | None = None,
    progress: Progress = no_progress,
    sleep: Sleep = asyncio.sleep,
) -> LoadResult:
    """Runs the warm-up, and then the workload as the plan says.

    Args:
        workload: What is asked.
        client: Where; `find_model` has been called.
        plan: When.
        warm_up: Sessions that are sent before the test starts, as many at a time as the plan's
            concurrency lets through, else one after the other.
        stop: Ends the test when it is set: requests in flight are given up.
        progress: Is told of every request that has ended, and of those that never will be sent.
        sleep: Waits so many seconds of the client's clock.

    Raises:
        ValueError: The plan has not one start for each session.
    """
    if plan.starts_s is not None and len(plan.starts_s) != len(workload.sessions):
        raise ValueError(
            f"{len(plan.starts_s)} starts are planned for {len(workload.sessions)} sessions"
        )
    stop = asyncio.Event() if stop is None else stop
    before = _Run(workload, client, None, sleep, no_progress)
    await before.until(before.closed_loop(warm_up, plan.concurrency or 1), stop)
    run = _Run(workload, client, plan, sleep, progress)
    run.begin()
    if not stop.is_set():
        loop = (
            run.open_loop(workload.sessions, plan.starts_s)
            if plan.starts_s is not None
            else run.closed_loop(workload.sessions, plan.concurrency or 1)
        )
        await run.until(loop, stop)
    ended_s = client.clock() - run.start_s
    last_s = max((record.finished_s for record in run.records), default=0.0)
    num_turns = sum(len(session.turns) for session in workload.sessions)
    shift_s = before.start_s - run.start_s
    return LoadResult(
        records=(*(_as_warm_up(each, shift_s) for each in before.records), *run.records),
        duration_s=ended_s if stop.is_set() else last_s,
        num_cut=run.num_cut,
        num_not_sent=num_turns - len(run.records) - run.num_cut,
        interrupted=stop.is_set(),
    )


@dataclass
class _Run:
    """One phase of a test.

    Attributes:
        start_s: Its zero on the client's clock.
        records: Of what has ended.
        in_flight: Requests that have not ended.
        num_cut: Those that were given up.
    """

    workload: Workload
    client: Client
    plan: Plan | None
    sleep: Sleep
    progress: Progress
    start_s: float = 0.0
    records: list[RequestRecord] = field(default_factory=list)
    in_flight: int = 0
    num_cut: int = 0
    _num_skipped: int = 0
    _num_failed: int = 0

    def __post_init__(self) -> None:
        self._num_turns = sum(len(session.turns) for session in self.workload.sessions)
        self.start_s = self.client.clock()
        self._places: AbstractAsyncContextManager[object] = nullcontext()
        plan = self.plan
        if plan is not None and plan.starts_s is not None and plan.concurrency is not None:
            self._places = asyncio.Semaphore(plan.concurrency)

    def begin(self) -> None:
        """Says where it begins, and sets its zero to now."""
        self._say()
        self.start_s = self.client.clock()

    def now_s(self) -> float:
        return self.client.clock() - self.start_s

    async def until(self, loop: Awaitable[None], stop: asyncio.Event) -> None:
        """Awaits a loop's end, or gives it up when it is told to stop."""
        running = asyncio.ensure_future(loop)
        stopping = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
                return
            self.num_cut = self.in_flight
            running.cancel()
            await asyncio.wait((running,))
        finally:
            for task in (running, stopping):
                task.cancel()

    async def open_loop(self, sessions: Sequence[Session], starts_s: Sequence[float]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for index, (session, due_s) in enumerate(zip(sessions, starts_s, strict=True)):
                # Also where it is late already: those that are due are sent before the next is.
                await self.sleep(max(0.0, due_s - self.now_s()))
                tasks.create_task(self._play(index, session, due_s))

    async def closed_loop(self, sessions: Sequence[Session], num_clients: int) -> None:
        left = iter(enumerate(sessions))
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(num_clients, len(sessions))):
                tasks.create_task(self._play_all(left))

    async def _play_all(self, sessions: Iterator[tuple[int, Session]]) -> None:
        for index, session in sessions:
            await self._play(index, session, self.now_s())

    async def _play(self, index: int, session: Session, due_s: float) -> None:
        """Sends a session's turns in order; one that fails leaves the others without history."""
        messages = list(session.history)
        for number, turn in enumerate(session.turns):
            messages.append(Message("user", turn.prompt))
            prompt = messages if self.workload.chat else turn.prompt
            request = Request(prompt, turn.max_tokens, self.workload.ignore_eos)
            record = await self._send(request, index, number, due_s)
            if turn.expected is not None and record.error is None:
                record = replace(record, correct=is_named(turn.expected, record.text))
            self.records.append(record)
            if record.error is not None:
                self._num_failed += 1
                self._num_skipped += len(session.turns) - number - 1
            self._say()
            if record.error is not None:
                return
            messages.append(Message("assistant", record.text))
            due_s = self.now_s()

    async def _send(self, request: Request, session: int, turn: int, due_s: float) -> RequestRecord:
        waits = isinstance(self._places, asyncio.Semaphore) and self._places.locked()
        async with self._places:
            self.in_flight += 1
            try:
                return await self.client.send(
                    request,
                    session=session,
                    turn=turn,
                    scheduled_s=self.now_s() if waits else due_s,
                    start_s=self.start_s,
                )
            finally:
                self.in_flight -= 1

    def _say(self) -> None:
        failed = f", {self._num_failed} failed" if self._num_failed else ""
        note = f"{self.in_flight} in flight{failed}"
        self.progress(len(self.records) + self._num_skipped, self._num_turns, note)


def _as_warm_up(record: RequestRecord, shift_s: float) -> RequestRecord:
    """A record of the warm-up, on the test's clock."""
    return replace(
        record,
        scheduled_s=record.scheduled_s + shift_s,
        sent_s=record.sent_s + shift_s,
        token_times_s=tuple(each + shift_s for each in record.token_times_s),
        finished_s=record.finished_s + shift_s,
        warm_up=True,
    )
