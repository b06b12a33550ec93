import asyncio
import time
from dataclasses import replace

import pytest

from headlong.server.engine.outputs import (
    PositionLogprobs,
    PrefillChunk,
    RequestOutput,
    TokenLogprob,
)
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampling_params import SamplingParams
from headlong.server.errors import (
    ContextLengthError,
    DrainingError,
    EngineDeadError,
    HeadlongError,
    RequestAbortedError,
)
from headlong.server.queue_gate import QueueGate
from headlong.server.request_stream import MAX_WAITING_OUTPUTS, RequestStream
from support.observer import Recorder

BLANK = RequestOutput(
    request_id="r",
    text="",
    token_ids=(),
    logprobs=None,
    finish_reason=None,
    stop_reason=None,
    num_prompt_tokens=3,
    num_cached_tokens=0,
    num_completion_tokens=0,
)


def token(number, index=0, last=False):
    return replace(
        BLANK,
        index=index,
        text=f"{index}.{number} ",
        token_ids=(number,),
        logprobs=(PositionLogprobs(TokenLogprob(number, "", -1.0), ()),),
        num_completion_tokens=number,
        finish_reason="length" if last else None,
    )


def make(n=1, ticket=None):
    observer = Recorder()
    request = EngineRequest("r", [1, 2, 3], SamplingParams(), n=n)
    return RequestStream(request, ticket, observer), observer


async def read(stream):
    return [output async for output in stream]


def test_outputs_come_one_by_one_to_a_reader_that_keeps_up():
    outputs = [replace(BLANK, queued_s=0.5), token(1), token(2), token(3, last=True)]

    async def scenario():
        stream, observer = make()
        reader = asyncio.create_task(read(stream))
        for output in outputs:
            await asyncio.sleep(0)
            assert stream.is_pending
            stream.deliver(output)
        assert not stream.is_pending
        assert await reader == outputs
        assert not stream.close()
        return observer

    observer = asyncio.run(scenario())
    assert observer.names == ["started", "first_token", "token", "token", "finished"]
    assert observer.started == [0.5]
    assert observer.finished == [("length", 3, 3)]


def test_a_slow_reader_loses_nothing_and_holds_little():
    count = 10 * MAX_WAITING_OUTPUTS

    async def scenario():
        stream, observer = make(n=3)
        stream.deliver(replace(BLANK, queued_s=0.5))
        for number in range(1, count + 1):
            for index in range(3):
                stream.deliver(token(number, index, last=number == count))
        return await read(stream), observer

    outputs, observer = asyncio.run(scenario())
    assert len(outputs) <= MAX_WAITING_OUTPUTS + 3
    for index in range(3):
        own = [output for output in outputs if output.index == index]
        numbers = list(range(1, count + 1))
        assert [each for output in own for each in output.token_ids] == numbers
        assert "".join(output.text for output in own) == "".join(f"{index}.{n} " for n in numbers)
        positions = [each for output in own for each in output.logprobs or ()]
        assert [position.chosen.token_id for position in positions] == numbers
        assert [output.finish_reason for output in own if output.finish_reason] == ["length"]
        assert own[-1].num_completion_tokens == count
    # It is the engine's time that counts, and not the reader's.
    assert observer.names.count("token") == 3 * (count - 1)


def test_an_error_comes_after_what_waits():
    async def scenario():
        stream, observer = make(n=2)
        for output in (replace(BLANK, queued_s=0.1), token(1), token(2, last=True)):
            stream.deliver(output)
        stream.fail(EngineDeadError("gone"))
        assert [(await anext(stream)).token_ids for _ in range(3)] == [(), (1,), (2,)]
        with pytest.raises(EngineDeadError, match="gone"):
            await anext(stream)
        assert not stream.close()
        return observer

    observer = asyncio.run(scenario())
    assert observer.finished == [("length", 3, 2), ("engine_dead", 3, 0)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (EngineDeadError("gone"), "engine_dead"),
        (DrainingError("closing"), "draining"),
        (RequestAbortedError("no memory"), "abort"),
        (HeadlongError("who knows"), "abort"),
    ],
)
def test_whatever_cuts_a_stream_has_a_name_that_metrics_know(error, reason):
    async def scenario():
        stream, observer = make()
        stream.deliver(replace(BLANK, queued_s=0.1))
        stream.fail(error)
        assert not stream.close()
        return observer

    observer = asyncio.run(scenario())
    assert observer.finished == [(reason, 3, 0)]
    assert [each.reason for each in observer.records[0].completions] == [reason]


def test_what_the_prefix_cache_had_is_told_of_the_completion_that_was_computed():
    async def scenario():
        stream, observer = make(n=2)
        stream.deliver(replace(BLANK, queued_s=0.1, num_cached_tokens=1))
        first = replace(token(1, 0, last=True), num_cached_tokens=1, cache_misses={"never_seen": 2})
        stream.deliver(first)
        stream.deliver(replace(token(1, 1, last=True), num_cached_tokens=3))
        stream.close()
        return observer.records[0]

    record = asyncio.run(scenario())
    assert record.num_cached_tokens == 1
    assert record.cache_misses == {"never_seen": 2}


def test_a_finished_stream_does_not_fail():
    async def scenario():
        stream, _ = make()
        stream.deliver(token(1, last=True))
        stream.fail(EngineDeadError("gone"))
        return await read(stream)

    assert len(asyncio.run(scenario())) == 1


def test_a_refused_request_never_ran():
    async def scenario():
        stream, observer = make()
        stream.refuse(ContextLengthError("long"))
        with pytest.raises(ContextLengthError):
            await anext(stream)
        assert not stream.close()
        return observer

    observer = asyncio.run(scenario())
    assert observer.names == []


@pytest.mark.parametrize("end", ["first output", "refused", "closed"])
def test_its_place_in_the_queue_is_given_back_once(end):
    gate = QueueGate(5)
    ticket = gate.enter(2)

    async def scenario():
        stream, observer = make(ticket=ticket)
        if end == "first output":
            stream.deliver(replace(BLANK, queued_s=0.5))
            assert gate.num_queued == 1
        elif end == "refused":
            stream.refuse(ContextLengthError("long"))
        pending = stream.close()
        assert pending == (end != "refused")
        return observer

    observer = asyncio.run(scenario())
    assert gate.num_queued == 1
    left = [] if end == "refused" else [("cancelled", 3, 0)]
    assert observer.finished == left


def test_one_that_is_given_up_in_the_queue_never_started():
    async def scenario():
        stream, observer = make()
        stream.deliver(replace(BLANK, finish_reason="abort", error_code="deadline_exceeded"))
        return observer

    observer = asyncio.run(scenario())
    assert observer.names == ["finished"]
    assert observer.finished == [("deadline_exceeded", 3, 0)]


def test_a_prefill_begins_when_the_request_leaves_the_queue():
    times = []

    class Times(Recorder):
        def on_first_token(self, ttft_s, prefill_s):
            times.append((ttft_s, prefill_s))

    async def scenario():
        request = EngineRequest("r", [1], SamplingParams(), arrived=time.monotonic() - 2.0)
        stream = RequestStream(request, None, Times())
        # Of a short prompt both come in one report.
        stream.deliver(replace(BLANK, queued_s=0.5))
        stream.deliver(token(1, last=True))

    asyncio.run(scenario())
    ((ttft_s, prefill_s),) = times
    assert ttft_s >= 2.0
    assert ttft_s - prefill_s == pytest.approx(0.5)


def test_the_record_of_a_request_that_ended():
    chunks = (PrefillChunk(1.0, 2), PrefillChunk(2.0, 1))

    async def scenario():
        stream, observer = make(n=2)
        stream.deliver(replace(BLANK, queued_s=0.0, num_cached_tokens=1))
        stream.deliver(replace(token(1), prefill_chunks=chunks, num_cached_tokens=1))
        stream.deliver(replace(token(1, index=1), num_cached_tokens=2))
        stream.deliver(
            replace(token(2, last=True), num_cached_tokens=1, cache_misses={"never_seen": 2})
        )
        assert observer.records == []
        stream.close()
        return observer

    (record,) = asyncio.run(scenario()).records
    assert record.request.n == 2
    assert record.started >= record.request.arrived
    assert record.prefill_chunks == chunks
    assert (record.num_cached_tokens, record.cache_misses) == (1, {"never_seen": 2})
    first, second = record.completions
    assert (first.reason, first.num_tokens) == ("length", 2)
    assert (second.reason, second.num_tokens) == ("cancelled", 1)
    assert record.first_token == first.first_token <= second.first_token
    assert record.last_token == first.last_token > first.first_token
    assert record.ended == second.ended >= first.ended


@pytest.mark.parametrize("end", ["refused", "in the queue", "dead"])
def test_records_of_requests_without_tokens(end):
    async def scenario():
        stream, observer = make()
        if end == "refused":
            stream.refuse(ContextLengthError("long"))
        elif end == "dead":
            stream.deliver(replace(BLANK, queued_s=0.1))
            stream.fail(EngineDeadError("gone"))
        stream.close()
        return observer

    records = asyncio.run(scenario()).records
    if end == "refused":
        assert records == []
        return
    (record,) = records
    assert record.first_token is record.last_token is None
    assert (record.started is None) == (end == "in the queue")
    reason = "engine_dead" if end == "dead" else "cancelled"
    assert record.completions[0].reason == reason
