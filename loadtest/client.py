"""Sends one request to an OpenAI endpoint and notes when the pieces of its answer come."""

import asyncio
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp

from headlong.loadtest.answers import AnswerError, StreamedAnswer, error_message
from headlong.loadtest.records import ErrorKind, RequestRecord
from headlong.loadtest.sse import EventReader
from headlong.loadtest.workload import Message

READY_TIMEOUT_S = 10.0
MAX_BODY_BYTES = 1 << 20
"""Of an answer that is no stream: an error, or the list of models."""
MAX_STREAM_BYTES = 1 << 20
MAX_STREAM_BYTES_PER_TOKEN = 4096
"""Together the most that is read of a stream: a server may send what was not asked for."""
REJECTED = (429, 503)

# Servers close idle connections after 5 seconds or more; one that is being closed is not used.
_KEEP_ALIVE_S = 4.0

Clock = Callable[[], float]


class EndpointError(ValueError):
    """The endpoint cannot be reached, or is none."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of the server.

    Attributes:
        prompt: A completion's text, or the messages of a chat.
        max_tokens: Most tokens of the answer.
        ignore_eos: Whether it is to be as long as that. It is only sent where it is True: not
            every server knows it.
    """

    prompt: str | Sequence[Message]
    max_tokens: int
    ignore_eos: bool = False

    @property
    def chat(self) -> bool:
        """Whether it is one of a chat."""
        return not isinstance(self.prompt, str)

    def body(self, model: str) -> dict[str, Any]:
        """Returns the JSON that is sent: greedy, streamed, with the counts of tokens."""
        prompt: dict[str, Any]
        if isinstance(self.prompt, str):
            prompt = {"prompt": self.prompt}
        else:
            prompt = {"messages": [{"role": m.role, "content": m.content} for m in self.prompt]}
        body = {
            "model": model,
            **prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        return body


class Client:
    """Connections to one endpoint, as many as are needed; used as an asynchronous context.

    Nothing is compressed, redirected or sent twice: all of it would hide what the server does.

    Args:
        base_url: Where the server is, with or without ``/v1``.
        model: The name that requests carry; None until `find_model` has asked for it.
        api_key: Sent as a bearer token if there is one.
        timeout_s: The longest that one request may take, from being sent to its end.
        clock: Seconds, monotonic.

    Raises:
        EndpointError: `base_url` is no HTTP address, or `model` is empty.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        clock: Clock = time.monotonic,
    ) -> None:
        if model == "":
            raise EndpointError("model must not be empty")
        _check_address(base_url)
        self.url = base_url.rstrip("/").removesuffix("/v1")
        self.model = model
        self.clock = clock
        self.timeout_s = timeout_s
        self._headers = {"Accept-Encoding": "identity"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
            auto_decompress=False,
            # One limit over the whole request is set around it.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def find_model(self) -> str:
        """Asks whether the endpoint is there, and which model it serves if none is named.

        Returns:
            The model that requests name from now on.

        Raises:
            EndpointError: It cannot be reached, refuses the key, or serves none or several models
                and none is named.
        """
        url = f"{self.url}/v1/models"
        try:
            async with (
                asyncio.timeout(READY_TIMEOUT_S),
                # A server that fails here may close the connection without saying so.
                self._opened.get(
                    url, headers={"Connection": "close"}, allow_redirects=False
                ) as response,
            ):
                status, body = response.status, await _read_body(response)
        except TimeoutError as error:
            raise EndpointError(
                f"cannot reach {self.url}: no answer in {READY_TIMEOUT_S:g} s"
            ) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise EndpointError(f"cannot reach {self.url}: {_said(error)}") from error
        if status in (401, 403):
            raise EndpointError(f"{self.url} refuses the API key: {_message(body)}")
        if self.model is not None:
            # It is there; not every server lists what it serves.
            return self.model
        if status != 200:
            raise EndpointError(f"{url} answers {status}: name the model with --model")
        names = _model_names(body)
        if len(names) != 1:
            found = f"{len(names)} models: {', '.join(names[:5])}" if names else "no model"
            raise EndpointError(f"{url} lists {found}; name one with --model")
        self.model = names[0]
        return self.model

    async def check(self, *, chat: bool, ignore_eos: bool) -> None:
        """Sends one small request, so that what no request can do right is said before the test.

        Args:
            chat: Whether the test is one of chats.
            ignore_eos: Whether its requests say so.

        Raises:
            EndpointError: It fails.
        """
        prompt = [Message("user", "Hello")] if chat else "Hello"
        record = await self.send(Request(prompt, 2, ignore_eos))
        if record.error is None:
            return
        status = "" if record.status in (None, 200) else f" {record.status}"
        message = f"{self.url} fails a first request:{status} {record.detail}"
        if ignore_eos and "ignore_eos" in record.detail:
            message += "; leave the field out with --no-ignore-eos"
        raise EndpointError(message)

    async def send(
        self,
        request: Request,
        *,
        session: int = 0,
        turn: int = 0,
        scheduled_s: float | None = None,
        start_s: float = 0.0,
    ) -> RequestRecord:
        """Sends a request and reads its answer to the end.

        Whatever goes wrong with it is in the record.

        Args:
            request: What is asked.
            session: For the record.
            turn: For the record.
            scheduled_s: When it was to be sent, in seconds after `start_s`; now if None.
            start_s: The test's start on the clock.
        """
        assert self.model is not None, "find_model comes first"
        answer = StreamedAnswer(request.chat)
        path = "/v1/chat/completions" if request.chat else "/v1/completions"
        limit = MAX_STREAM_BYTES + MAX_STREAM_BYTES_PER_TOKEN * request.max_tokens
        data = json.dumps(request.body(self.model)).encode()
        status: int | None = None
        failure: AnswerError | None = None
        sent = self.clock()
        try:
            async with (
                asyncio.timeout(self.timeout_s),
                self._opened.post(
                    f"{self.url}{path}",
                    data=data,
                    headers={"Content-Type": "application/json"},
                    allow_redirects=False,
                ) as response,
            ):
                status = response.status
                await self._read(response, answer, limit)
        except AnswerError as error:
            failure = error
        except TimeoutError:
            after = " after the whole answer" if answer.is_whole else ""
            failure = AnswerError("timeout", f"no end{after} in {self.timeout_s:g} s")
        except aiohttp.ClientResponseError as error:
            failure = AnswerError("protocol", f"not HTTP: {error.message}")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            failure = AnswerError("connect" if status is None else "stream", _said(error))
        ended = self.clock()
        if failure is None and answer.last_choice_s is not None:
            ended = answer.last_choice_s
        return RequestRecord(
            session=session,
            turn=turn,
            scheduled_s=sent - start_s if scheduled_s is None else scheduled_s,
            sent_s=sent - start_s,
            token_times_s=tuple(each - start_s for each in answer.piece_times_s),
            finished_s=ended - start_s,
            num_prompt_tokens=answer.num_prompt_tokens,
            num_completion_tokens=answer.num_completion_tokens,
            num_cached_tokens=answer.num_cached_tokens,
            text=answer.text,
            error=None if failure is None else failure.kind,
            status=status,
            detail="" if failure is None else failure.detail,
        )

    async def _read(
        self, response: aiohttp.ClientResponse, answer: StreamedAnswer, limit: int
    ) -> None:
        if response.status != 200:
            kind: ErrorKind = "rejected" if response.status in REJECTED else "http"
            raise AnswerError(kind, _message(await _read_body(response)) or response.reason or "")
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise AnswerError("protocol", f"compressed, which was not asked for: {encoding}")
        if response.content_type != "text/event-stream":
            raise AnswerError("protocol", f"not an event stream: {response.content_type}")
        reader = EventReader()
        num_bytes = 0
        async for chunk in response.content.iter_any():
            now = self.clock()
            num_bytes += len(chunk)
            if num_bytes > limit:
                raise AnswerError("protocol", f"a stream of more than {limit} bytes")
            try:
                events = reader.feed(chunk)
            except ValueError as error:
                raise AnswerError("protocol", str(error)) from error
            for event in events:
                answer.take(event, now)
        now = self.clock()
        for event in reader.end():
            answer.take(event, now)
        if not answer.is_whole:
            raise AnswerError("stream", "the stream ended before the answer did")

    @property
    def _opened(self) -> aiohttp.ClientSession:
        assert self._session is not None, "used outside of its context"
        return self._session


def _check_address(base_url: str) -> None:
    if "@" in base_url.partition("://")[2].partition("/")[0]:
        # It would be in every message and report.
        raise EndpointError("base-url must not hold a user's name or password: use an API key")
    try:
        parts = urlsplit(base_url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise EndpointError(f"base-url is no address: {error}, got {base_url!r}") from error
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise EndpointError(f"base-url must begin with http:// or https://, got {base_url!r}")
    if "?" in base_url or "#" in base_url:
        raise EndpointError(f"base-url must end with the path, got {base_url!r}")


async def _read_body(response: aiohttp.ClientResponse) -> bytes:
    """The beginning of a body."""
    parts: list[bytes] = []
    left = MAX_BODY_BYTES
    async for chunk in response.content.iter_any():
        parts.append(chunk[:left])
        left -= len(parts[-1])
        if not left:
            break
    return b"".join(parts)


def _message(body: bytes) -> str:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return body[:1000].decode(errors="replace")
    return error_message(value) if isinstance(value, dict) else str(value)


def _model_names(body: bytes) -> list[str]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return []
    models = value.get("data") if isinstance(value, dict) else None
    entries = models if isinstance(models, list) else []
    names = [entry.get("id") for entry in entries if isinstance(entry, dict)]
    return [name for name in names if isinstance(name, str) and name and name.isprintable()]


def _said(error: BaseException) -> str:
    """What an error says, or its name: some say nothing."""
    if isinstance(error, aiohttp.ClientConnectorError):
        reason = error.os_error
        # What asyncio says of a refused connection is where it called, not why it failed.
        code = reason.errno or 0
        return os.strerror(code) if code > 0 else reason.strerror or str(reason)
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the connection ended before the answer did"
    return str(error) or type(error).__name__
