import asyncio
import socket
from typing import Any

import pytest
from aiohttp import web

from headlong.loadtest import client as client_module
from headlong.loadtest.client import Client, Request
from headlong.loadtest.records import RequestRecord
from headlong.loadtest.workload import Message
from support.scripted_endpoint import (
    DONE,
    MODEL,
    Endpoint,
    Exchange,
    answer_at_once,
    event,
    piece,
    raw_server,
    refuses,
    usage,
    use,
)

COMPLETION = Request("Hello", 3)
CHAT = Request([Message("system", "Be brief"), Message("user", "Hello")], 3)


def send(script: Any, request: Request = COMPLETION, **options: Any) -> RequestRecord:
    return use(Endpoint(script), lambda client: client.send(request), **options)


def says(*chunks: bytes, content_type: str = "text/event-stream") -> Any:
    """A script that writes these bytes."""

    async def script(exchange: Exchange) -> web.StreamResponse:
        await exchange.begin(content_type)
        for chunk in chunks:
            await exchange.write(chunk)
        return exchange.response

    return script


def test_a_completion() -> None:
    endpoint = Endpoint(answer_at_once)
    record = use(endpoint, lambda client: client.send(COMPLETION, session=4, turn=2))
    assert endpoint.bodies == [
        {
            "model": MODEL,
            "prompt": "Hello",
            "max_tokens": 3,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    assert record.error is None
    assert (record.session, record.turn, record.status) == (4, 2, 200)
    assert record.text == "w0 w1 w2 "
    assert len(record.token_times_s) == 3
    assert (record.num_prompt_tokens, record.num_completion_tokens) == (7, 3)
    assert record.num_cached_tokens == 3
    assert record.sent_s <= record.token_times_s[0] <= record.finished_s


def test_a_chat_with_a_key() -> None:
    endpoint = Endpoint(answer_at_once)
    record = use(endpoint, lambda client: client.send(CHAT), api_key="secret")
    assert endpoint.exchanges[0].request.path == "/v1/chat/completions"
    assert endpoint.authorizations == ["Bearer secret"]
    assert endpoint.bodies[0]["messages"] == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Hello"},
    ]
    assert record.text == "w0 w1 w2 "


def test_without_a_key_there_is_no_header() -> None:
    endpoint = Endpoint(answer_at_once)
    use(endpoint, lambda client: client.send(COMPLETION))
    assert endpoint.authorizations == [None]


def test_ignore_eos_is_only_sent_where_it_is_asked_for() -> None:
    endpoint = Endpoint(answer_at_once)
    use(endpoint, lambda client: client.send(Request("Hello", 1, ignore_eos=True)))
    assert endpoint.bodies[0]["ignore_eos"] is True


def test_what_is_no_text_is_no_piece() -> None:
    record = send(
        says(
            event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}),
            event({"choices": [{"delta": {"role": "assistant", "content": None}}]}),
            event({"choices": [{"delta": None}]}),
            event({"choices": [{}]}),
            piece("", chat=True),
            piece("one", chat=True),
            event({"choices": [{"delta": {"content": None, "reasoning_content": "hm"}}]}),
            event({"choices": [{"delta": {}, "finish_reason": "stop"}]}),
            event({"choices": [], "usage": usage(5, 2)}),
            DONE,
        ),
        CHAT,
    )
    assert record.error is None
    assert record.text == "one"
    # Reasoning is generated text too.
    assert len(record.token_times_s) == 2


def test_the_last_count_holds_and_may_come_with_a_piece() -> None:
    record = send(
        says(
            piece("a", usage=usage(5, 1)),
            event({"usage": usage(5, 2)}),
            piece("b", finish="length", usage=usage(5, 3, 4)),
        )
    )
    assert record.error is None
    counts = record.num_prompt_tokens, record.num_completion_tokens, record.num_cached_tokens
    assert counts == (5, 3, 4)


@pytest.mark.parametrize(
    "counts", [{}, None, {"completion_tokens": "3"}, {"completion_tokens": -1}, 7,
               {"completion_tokens": 10**300, "prompt_tokens_details": []}]
)  # fmt: skip
def test_a_server_that_does_not_count(counts: Any) -> None:
    record = send(says(piece("a", finish="stop", usage=counts), DONE))
    assert record.error is None
    assert record.num_completion_tokens is None
    assert record.num_prompt_tokens is None


def test_quirks_of_the_event_stream() -> None:
    record = send(
        says(
            b': hello\r\n\r\ndata:{"choices":\r\ndata:[{"text":"a"}]}\r\n',
            b'\r\nevent: x\ndata: {"choi',
            b'ces": [{"text": "\xc3',
            b'\xa9", "finish_reason": "stop"}]}\n\ndata: [DONE]',
        )
    )
    assert record.error is None
    assert record.text == "aé"


@pytest.mark.parametrize("end", [DONE, b"", b": over\n\n"])
def test_the_end_mark_is_not_needed_after_a_finish_reason(end: bytes) -> None:
    record = send(says(piece("a"), piece("", finish="stop"), end))
    assert record.error is None
    assert record.finished_s >= record.token_times_s[-1]


def test_a_whole_answer_may_be_empty() -> None:
    record = send(says(piece("", finish="stop", usage=usage(5, 1)), DONE))
    assert record.error is None
    assert record.token_times_s == ()
    assert record.ttft_s is None


@pytest.mark.parametrize(
    ("chunks", "kind", "detail"),
    [
        ([piece("a")], "stream", "the stream ended before the answer did"),
        ([], "stream", "the stream ended before the answer did"),
        ([piece("a"), event({"error": {"message": "went\n wrong"}}), DONE], "stream", "went wrong"),
        ([piece("a"), event({"error": "went wrong"})], "stream", "went wrong"),
        ([b"data: {oops\n\n"], "protocol", "a chunk that is not JSON: {oops"),
        ([b"data: [1]\n\n"], "protocol", "a chunk that is no object: [1]"),
        ([b"data: " + b"[" * 100_000 + b"\n\n"], "protocol", "a chunk that is not JSON: [[["),
        ([event({"text": "a"})], "protocol", 'a chunk without choices: {"text": "a"}'),
        ([event({"choices": [1]})], "protocol", "a choice that is no object"),
    ],
)
def test_streams_that_go_wrong(chunks: list[bytes], kind: str, detail: str) -> None:
    record = send(says(*chunks))
    assert record.error == kind
    assert record.status == 200
    assert record.detail.startswith(detail)
    assert len(record.detail) <= 200


@pytest.mark.parametrize(
    ("status", "body", "kind", "detail"),
    [
        (429, '{"error": {"message": "the queue is full"}}', "rejected", "the queue is full"),
        (503, '{"detail": "starting"}', "rejected", "starting"),
        (404, '{"error": {"message": "no such model"}}', "http", "no such model"),
        (422, '{"detail": [{"loc": ["body"]}]}', "http", '[{"loc": ["body"]}]'),
        (500, "oops " * 100_000, "http", "oops oops"),
        (502, b"\xff\xfe", "http", "\ufffd\ufffd"),
        (302, "elsewhere", "http", "elsewhere"),
    ],
)
def test_statuses(status: int, body: str | bytes, kind: str, detail: str) -> None:
    record = send(refuses(status, body))
    assert (record.error, record.status) == (kind, status)
    assert record.detail.startswith(detail)
    assert len(record.detail) <= 200


def test_an_answer_that_is_not_streamed_is_said_to_be_none() -> None:
    record = send(refuses(200, '{"choices": [{"text": "a"}]}'))
    assert record.error == "protocol"
    assert record.detail == "not an event stream: application/json"


def test_a_connection_that_breaks_in_the_middle() -> None:
    async def script(exchange: Exchange) -> web.StreamResponse:
        await exchange.begin()
        await exchange.write(piece("a"))
        assert exchange.request.transport is not None
        exchange.request.transport.close()
        return exchange.response

    record = send(script)
    assert record.error == "stream"
    assert record.text == "a"


def test_a_connection_that_breaks_before_an_answer() -> None:
    async def script(exchange: Exchange) -> web.StreamResponse:
        assert exchange.request.transport is not None
        exchange.request.transport.close()
        return exchange.response

    record = send(script)
    assert record.error == "connect"
    assert record.status is None
    assert record.detail


@pytest.mark.parametrize("num_pieces", [0, 2])
def test_an_answer_that_takes_too_long(num_pieces: int) -> None:
    async def script(exchange: Exchange) -> web.StreamResponse:
        await exchange.begin()
        for _ in range(num_pieces):
            await exchange.write(piece("a"))
        await asyncio.Event().wait()
        return exchange.response

    record = send(script, timeout_s=0.3)
    assert record.error == "timeout"
    assert record.detail == "no end in 0.3 s"
    assert len(record.text) == num_pieces


def test_a_connection_that_stays_open_after_the_answer_is_told() -> None:
    async def script(exchange: Exchange) -> web.StreamResponse:
        await exchange.begin()
        await exchange.write(piece("a", finish="stop") + DONE)
        await asyncio.Event().wait()
        return exchange.response

    record = send(script, timeout_s=0.4)
    assert (record.error, record.text) == ("timeout", "a")
    assert record.detail == "no end after the whole answer in 0.4 s"


def test_texts_that_no_file_or_terminal_should_get() -> None:
    async def script(exchange: Exchange) -> web.StreamResponse:
        await exchange.begin()
        await exchange.write(piece("a\ud83d") + piece("\ude00\ud800"))
        await exchange.write(event({"error": {"message": "no\x1b[2J \ud800"}}))
        return exchange.response

    record = send(script)
    # Both halves of a pair in two pieces are one character; half of one is none.
    assert record.text == "a\N{GRINNING FACE}\N{REPLACEMENT CHARACTER}"
    assert record.detail == "no\N{REPLACEMENT CHARACTER}[2J \N{REPLACEMENT CHARACTER}"


def test_choices_may_be_null_beside_the_count() -> None:
    async def script(exchange: Exchange) -> web.StreamResponse:
        await exchange.begin()
        await exchange.write(piece("a", finish="stop"))
        await exchange.write(event({"choices": None, "usage": usage(4, 1)}) + DONE)
        return exchange.response

    assert send(script).num_completion_tokens == 1


def test_a_stream_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MAX_STREAM_BYTES", 1 << 16)

    async def script(exchange: Exchange) -> web.StreamResponse:
        await exchange.begin()
        while True:
            await exchange.write(piece("again " * 100))

    record = send(script)
    assert record.error == "protocol"
    assert record.detail == f"a stream of more than {(1 << 16) + 3 * 4096} bytes"
    assert len(record.text) < 1 << 18


def test_an_error_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MAX_BODY_BYTES", 1 << 16)

    async def script(exchange: Exchange) -> web.StreamResponse:
        exchange.response.set_status(500)
        await exchange.begin("text/plain")
        while True:
            await exchange.write(b"oops " * 1000)

    record = send(script)
    assert (record.error, record.status) == ("http", 500)


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "Bad status line"),
        (b"HTTP/1.1 200 " + b"b" * 10_000, "more than 8190 bytes"),
        (b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 10_000, "Too many headers"),
        (b"HTTP/1.1 200 OK\r\nX-A: " + b"b" * 100_000, "more than 8190 bytes"),
    ],
)
def test_a_server_that_does_not_speak_http(answer: bytes, detail: str) -> None:
    async def main() -> RequestRecord:
        async with raw_server(answer) as url, Client(url, MODEL) as client:
            return await client.send(COMPLETION)

    record = asyncio.run(main())
    assert (record.error, record.status) == ("protocol", None)
    assert detail in record.detail


def test_a_compressed_answer_is_not_unpacked() -> None:
    async def script(exchange: Exchange) -> web.StreamResponse:
        assert exchange.request.headers["Accept-Encoding"] == "identity"
        exchange.response.enable_compression(web.ContentCoding.gzip)
        await exchange.begin()
        await exchange.write(piece("a", finish="stop"))
        return exchange.response

    record = send(script)
    assert (record.error, record.detail) == (
        "protocol",
        "compressed, which was not asked for: gzip",
    )


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


def test_nobody_listens() -> None:
    async def main() -> RequestRecord:
        async with Client(f"http://127.0.0.1:{free_port()}", MODEL) as client:
            return await client.send(COMPLETION)

    record = asyncio.run(main())
    assert (record.error, record.status, record.detail) == ("connect", None, "Connection refused")
