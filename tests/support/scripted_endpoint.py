"""An OpenAI endpoint that says what a test tells it to, and notes when."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from aiohttp import web

from headlong.loadtest.client import Client

PATIENCE_S = 30
MODEL = "scripted"
T = TypeVar("T")
DONE = b"data: [DONE]\n\n"

Script = Callable[["Exchange"], Awaitable[web.StreamResponse]]


@dataclass
class Exchange:
    """One request, and the times at which the server did something about it, on its own clock."""

    request: web.Request
    body: dict[str, Any]
    number: int
    received: float
    written: list[float] = field(default_factory=list)
    response: web.StreamResponse = field(default_factory=web.StreamResponse)

    async def begin(self, content_type: str = "text/event-stream") -> None:
        self.response.content_type = content_type
        await self.response.prepare(self.request)

    async def write(self, data: bytes) -> None:
        self.written.append(time.monotonic())
        await self.response.write(data)

    @property
    def chat(self) -> bool:
        return "messages" in self.body


class Endpoint:
    """Counts and keeps the requests; the script answers them."""

    def __init__(self, script: Script, models: tuple[str, ...] = (MODEL,)) -> None:
        self.script = script
        self.models = models
        self.list_models: Callable[[web.Request], Awaitable[web.StreamResponse]] = self._models
        self.exchanges: list[Exchange] = []
        self.authorizations: list[str | None] = []
        self.url = ""
        self.num_open = 0
        self.most_open = 0

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [each.body for each in self.exchanges]

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        received = time.monotonic()
        self.authorizations.append(request.headers.get("Authorization"))
        exchange = Exchange(request, await request.json(), len(self.exchanges), received)
        self.exchanges.append(exchange)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            return await self.script(exchange)
        finally:
            self.num_open -= 1

    async def _models(self, request: web.Request) -> web.Response:
        self.authorizations.append(request.headers.get("Authorization"))
        return web.json_response({"object": "list", "data": [{"id": name} for name in self.models]})

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Self]:
        app = web.Application()
        app.router.add_post("/v1/completions", self._answer)
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_get("/v1/models", self.list_models)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            host, port = runner.addresses[0][:2]
            self.url = f"http://{host}:{port}"
            yield self
        finally:
            await runner.cleanup()


@contextmanager
def in_thread(endpoint: Endpoint) -> Iterator[Endpoint]:
    """Serves on a thread of its own, for what has an event loop of its own."""
    started = threading.Event()
    stop: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        stopping = asyncio.Event()
        async with endpoint.serving():
            stop.append((asyncio.get_running_loop(), stopping))
            started.set()
            await stopping.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(PATIENCE_S)
    try:
        yield endpoint
    finally:
        loop, stopping = stop[0]
        loop.call_soon_threadsafe(stopping.set)
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def piece(text: str, *, chat: bool = False, finish: str | None = None, **fields: Any) -> bytes:
    """A chunk with text."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
    choice |= {"delta": {"content": text}} if chat else {"text": text}
    return event({"choices": [choice], **fields})


def usage(prompt: int, completion: int, cached: int | None = None) -> dict[str, Any]:
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    return {"prompt_tokens": prompt, "completion_tokens": completion, **details}


async def answer_at_once(exchange: Exchange) -> web.StreamResponse:
    """As many pieces as tokens were asked for, then the counts."""
    count = exchange.body["max_tokens"]
    await exchange.begin()
    for index in range(count):
        finish = "length" if index == count - 1 else None
        await exchange.write(piece(f"w{index} ", chat=exchange.chat, finish=finish))
    await exchange.write(event({"choices": [], "usage": usage(7, count, 3)}) + DONE)
    return exchange.response


def refuses(status: int, body: str | bytes, content_type: str = "application/json") -> Script:
    """A script that answers with a status and a body."""

    async def script(_: Exchange) -> web.StreamResponse:
        data = body.encode() if isinstance(body, str) else body
        return web.Response(status=status, body=data, content_type=content_type)

    return script


@asynccontextmanager
async def raw_server(answer: bytes) -> AsyncIterator[str]:
    """Says the same to everybody."""

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(say, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def use(endpoint: Endpoint, call: Callable[[Client], Awaitable[T]], **options: Any) -> T:
    """What a call of a client on an endpoint returns."""

    async def main() -> T:
        options.setdefault("timeout_s", PATIENCE_S)
        options.setdefault("model", MODEL)
        async with endpoint.serving(), Client(endpoint.url, **options) as client:
            return await call(client)

    return asyncio.run(main())
