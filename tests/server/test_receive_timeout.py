import asyncio

import pytest

from headlong.server.errors import RequestTimeoutError
from headlong.server.receive_timeout import ReceiveTimeoutMiddleware

HALF = {"type": "http.request", "body": b"{", "more_body": True}
WHOLE = {"type": "http.request", "body": b"}", "more_body": False}


def serve(messages, num_reads, timeout_s=0.05):
    """Reads from a client that sends `messages` and then hangs until it is released."""
    read, waiting = [], iter(messages)

    async def run():
        released = asyncio.Event()

        async def receive():
            if (message := next(waiting, None)) is not None:
                return message
            asyncio.get_running_loop().call_later(4 * timeout_s, released.set)
            await released.wait()
            return {"type": "http.disconnect"}

        async def app(scope, receive, send):
            while len(read) < num_reads:
                read.append(await receive())

        await ReceiveTimeoutMiddleware(app, timeout_s)({"type": "http"}, receive, None)

    asyncio.run(asyncio.wait_for(run(), 30))
    return read


@pytest.mark.parametrize("messages", [[], [HALF], [HALF, HALF]])
def test_an_incomplete_body_does_not_wait_for_ever(messages):
    with pytest.raises(RequestTimeoutError, match=r"0\.05 s"):
        serve(messages, len(messages) + 1)


def test_a_complete_body_may_wait_as_long_as_its_answer_takes():
    assert serve([HALF, WHOLE], 3) == [HALF, WHOLE, {"type": "http.disconnect"}]
