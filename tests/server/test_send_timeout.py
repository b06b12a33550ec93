import asyncio

import pytest
from starlette.requests import ClientDisconnect

from headlong.server.api.schemas_common import ResponseModel
from headlong.server.api.streaming import EventStreamResponse
from headlong.server.send_timeout import SendTimeoutMiddleware


class Chunk(ResponseModel):
    number: int


def serve(response, num_sends):
    """Sends a response to a client that takes `num_sends` messages and then no more."""
    sent = []

    async def send(message):
        if len(sent) == num_sends:
            await asyncio.Event().wait()
        sent.append(message)

    async def receive():
        await asyncio.Event().wait()

    app = SendTimeoutMiddleware(response, 0.05)
    asyncio.run(asyncio.wait_for(app({"type": "http", "path": "/x"}, receive, send), 30))
    return sent


@pytest.mark.parametrize("num_sends", [0, 1, 4])
def test_a_stream_is_closed_when_its_client_stops_reading(num_sends):
    closed = []

    async def chunks():
        try:
            for number in range(10):
                yield Chunk(number=number)
        finally:
            closed.append(True)

    sent = serve(EventStreamResponse(chunks()), num_sends)
    assert len(sent) == num_sends
    assert closed == [True]


def test_a_client_that_reads_gets_all():
    async def chunks():
        yield Chunk(number=1)

    sent = serve(EventStreamResponse(chunks()), 100)
    assert sent[-1]["more_body"] is False


def test_the_application_sees_that_the_client_left():
    async def app(scope, receive, send):
        with pytest.raises(ClientDisconnect):
            await send({})

    assert serve(app, 0) == []
