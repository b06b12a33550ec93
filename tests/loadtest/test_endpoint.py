import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from headlong.loadtest.client import Client, EndpointError, Request
from headlong.loadtest.records import RequestRecord
from support.scripted_endpoint import MODEL, Endpoint, answer_at_once, raw_server, refuses, use


def find(endpoint: Endpoint, **options: Any) -> str:
    return use(endpoint, lambda client: client.find_model(), **options)


def test_the_model_is_asked_for() -> None:
    assert find(Endpoint(answer_at_once), model=None) == MODEL


@pytest.mark.parametrize("names", [(), ("a", "b")])
def test_a_model_must_be_named_where_there_is_not_one(names: tuple[str, ...]) -> None:
    with pytest.raises(EndpointError, match=r"lists (no model|2 models: a, b); name one with"):
        find(Endpoint(answer_at_once, names), model=None)
    assert find(Endpoint(answer_at_once, names), model="c") == "c"


def test_a_list_of_models_that_breaks_its_connection_breaks_nothing_else() -> None:
    endpoint = Endpoint(answer_at_once)

    async def fail(request: web.Request) -> web.Response:
        assert request.headers["Connection"] == "close"
        return web.Response(status=500)

    async def both(client: Client) -> RequestRecord:
        await client.find_model()
        return await client.send(Request("Hello", 3))

    endpoint.list_models = fail
    assert use(endpoint, both).error is None


@pytest.mark.parametrize(
    ("answer", "model", "message"),
    [
        (b"SSH-2.0-OpenSSH\r\n", MODEL, "cannot reach http"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", None, "lists no model"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", None, "answers 404"),
        (b"HTTP/1.1 401 No\r\nContent-Length: 3\r\n\r\nwho", MODEL, "refuses the API key: who"),
    ],
)
def test_what_is_no_endpoint(answer: bytes, model: str | None, message: str) -> None:
    async def main() -> None:
        async with raw_server(answer) as url, Client(url, model) as client:
            await client.find_model()

    with pytest.raises(EndpointError, match=message) as caught:
        asyncio.run(main())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://localhost", "http://", "http:///"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(EndpointError, match="base-url must begin with http:// or https://"):
        Client(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://host:99999", "base-url is no address: Port out of range"),
        ("http://[::1", "base-url is no address: Invalid IPv6"),
        ("http://host:0", "base-url must begin with http"),
        ("http://host/v1?key=a", "base-url must end with the path"),
        ("http://host/#a", "base-url must end with the path"),
    ],
)
def test_what_is_an_address_only_in_part(url: str, message: str) -> None:
    with pytest.raises(EndpointError, match=f"^{message}"):
        Client(url)


@pytest.mark.parametrize("url", ["http://me:secret@host:8000", "http://me:secret@[::1"])
def test_an_address_with_a_password_is_refused_without_saying_it(url: str) -> None:
    with pytest.raises(EndpointError, match="must not hold a user's name") as caught:
        Client(url)
    assert "secret" not in str(caught.value)


def test_the_address_may_end_in_v1() -> None:
    for url in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert Client(url).url == "http://h:1"


def test_the_first_request_is_tried() -> None:
    endpoint = Endpoint(answer_at_once)
    use(endpoint, lambda client: client.check(chat=True, ignore_eos=False))
    assert endpoint.exchanges[0].chat


def test_a_first_request_that_fails_says_what_to_do() -> None:
    fields = json.dumps({"detail": "Unexpected fields in the request: {'ignore_eos'}"})
    with pytest.raises(EndpointError, match=r"422 Unexpected fields.*with --no-ignore-eos"):
        use(
            Endpoint(refuses(422, fields)),
            lambda client: client.check(chat=False, ignore_eos=True),
        )
