import asyncio
import http.client
import json
from urllib.parse import urlsplit

import pytest
from starlette.requests import ClientDisconnect

from headlong.server.api.disconnect import cancel_on_disconnect
from headlong.server.app import create_app

BODIES = {
    "/v1/completions": {"model": "alias", "prompt": ["a", "b", "c"]},
    "/v1/chat/completions": {"model": "alias", "messages": [{"role": "user", "content": "x"}]},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("hang_at", [0, 2])
def test_a_client_that_leaves_frees_its_requests(live, engine, path, stream, hang_at):
    engine.hang_at = hang_at
    address = urlsplit(live)
    for _ in range(3):
        engine.hanging.clear()
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=20)
        body = json.dumps({**BODIES[path], "stream": stream})
        connection.request("POST", path, body, {"content-type": "application/json"})
        if stream and hang_at:
            assert connection.getresponse().readline().startswith(b"data: ")
        assert engine.hanging.wait(20)
        connection.close()
        assert engine.idle.wait(20)
    engine.hang_at = None
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=20)
    body = json.dumps(BODIES[path])
    connection.request("POST", path, body, {"content-type": "application/json"})
    assert connection.getresponse().status == 200
    connection.close()
    assert engine.num_aborted == 3 * (3 if path == "/v1/completions" else 1)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("num_sends", range(5))
def test_leaving_at_any_message_of_a_stream(engine, config, path, num_sends):
    """The client goes while the server hands over its message number `num_sends`."""
    app = create_app(engine, config)
    sent = []

    async def main():
        left = asyncio.Event()
        body = json.dumps({**BODIES[path], "stream": True}).encode()
        messages = [{"type": "http.request", "body": body}]

        async def receive():
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)
            if len(sent) == num_sends + 1:
                left.set()
                await asyncio.Event().wait()

        await engine.start()
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [(b"content-type", b"application/json")],
            "query_string": b"",
        }
        await asyncio.wait_for(app(scope, receive, send), 20)
        assert not engine.running

    asyncio.run(main())
    assert len(sent) == num_sends + 1


def test_leaving_while_the_body_arrives(engine, config):
    app = create_app(engine, config)
    messages = [
        {"type": "http.request", "body": b'{"model":', "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent = []

    async def main():
        await engine.start()
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": [(b"content-type", b"application/json")],
            "query_string": b"",
        }

        async def receive():
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        await app(scope, receive, send)

    asyncio.run(main())
    assert not engine.seen


def test_work_is_waited_for_when_it_is_cancelled():
    closed = []

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            closed.append(True)

    async def receive():
        return {"type": "http.disconnect"}

    with pytest.raises(ClientDisconnect):
        asyncio.run(cancel_on_disconnect(receive, work()))
    assert closed == [True]


def test_work_that_ends_is_returned():
    async def work():
        return 3

    async def receive():
        await asyncio.Event().wait()

    assert asyncio.run(cancel_on_disconnect(receive, work())) == 3
