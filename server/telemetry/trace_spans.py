"""The spans of a request: one for all of it, and below that its queue, prefill and decodes.

    llm_request       from the first byte of the headers to the last byte of the answer
    ├── queue         until the first step
    ├── prefill       until the first token, with an event for each chunk that was computed
    └── decode        until the last token; one for each completion

Names are those of OpenTelemetry's conventions for generative AI where these have one, else vLLM's.
Texts, keys and tenants are not among them.
"""

import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING

from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headlong.server.http_errors import CLIENT_CLOSED_REQUEST
from headlong.server.telemetry.logs import TRACE_ID
from headlong.server.telemetry.observer import EndedCompletion, EndedRequest, NoObserver

if TYPE_CHECKING:
    from opentelemetry.util.types import AttributeValue

SPAN_NAME = "llm_request"
OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
}
"""What is traced, and the convention's name of it."""

_GIVEN_UP = frozenset({"abort", "deadline_exceeded", "draining", "engine_dead"})
_propagator = TraceContextTextMapPropagator()


class RequestSpan:
    """The span of an HTTP request that is being served.

    Args:
        tracer: Makes it.
        parent: The client's span, if it sent one.
        attributes: Known at its start.
    """

    def __init__(
        self, tracer: Tracer, parent: Context, attributes: "Mapping[str, AttributeValue]"
    ) -> None:
        # The engine's times are those of another clock.
        self._clock_offset_ns = time.time_ns() - time.monotonic_ns()
        self._tracer = tracer
        self._span = tracer.start_span(
            SPAN_NAME, parent, SpanKind.SERVER, attributes, start_time=self._now()
        )
        self._context = set_span_in_context(self._span)
        self._records: list[EndedRequest] = []

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        return f"{self._span.get_span_context().trace_id:032x}"

    def add(self, record: EndedRequest) -> None:
        """Adds what one of the engine's requests went through."""
        if not self._span.is_recording():
            return
        self._records.append(record)
        request = record.request
        started = record.started
        name: Mapping[str, AttributeValue] = {"gen_ai.request.id": request.request_id}
        self._child("queue", name, request.arrived, record.ended if started is None else started)
        if started is None:
            return
        first = record.first_token
        through = record.ended if first is None else first
        prefill = self._start("prefill", {**name, **_prompt(record)}, started)
        for chunk in record.prefill_chunks:
            sizes = {"tokens": chunk.num_tokens, "steps": chunk.num_steps}
            prefill.add_event("prefill_chunk", sizes, self._ns(chunk.ended))
        prefill.end(self._ns(through))
        for index, completion in enumerate(record.completions):
            if completion.first_token is not None:
                about = {**name, "gen_ai.choice.index": index, **_completion(completion)}
                last = completion.last_token or completion.ended
                self._child("decode", about, completion.first_token, last)

    def end(self, status: int, error: str | None, model: str | None) -> None:
        """Ends it.

        Args:
            status: Of the response.
            error: Code of the error that was answered with, if it was.
            model: The model that was asked for, if it is known.
        """
        span = self._span
        if not span.is_recording():
            return
        span.set_attribute("http.response.status_code", status)
        if model is not None:
            span.set_attribute("gen_ai.request.model", model)
        if self._records:
            span.set_attributes(dict(_summary(self._records)))
        reasons = {each.reason for record in self._records for each in record.completions}
        # A stream that breaks has begun as a success.
        error = error or min(reasons & _GIVEN_UP, default=None)
        if error is not None:
            span.set_attribute("error.type", error)
        if status >= 500 or (status < 400 and error is not None):
            span.set_status(Status(StatusCode.ERROR))
        span.end(self._now())

    def _child(
        self, name: str, attributes: "Mapping[str, AttributeValue]", start: float, end: float
    ) -> None:
        self._start(name, attributes, start).end(self._ns(end))

    def _start(self, name: str, attributes: "Mapping[str, AttributeValue]", start: float) -> Span:
        return self._tracer.start_span(
            name, self._context, attributes=attributes, start_time=self._ns(start)
        )

    def _ns(self, seconds: float) -> int:
        return int(seconds * 1e9) + self._clock_offset_ns

    def _now(self) -> int:
        return time.monotonic_ns() + self._clock_offset_ns


_SPAN: ContextVar[RequestSpan | None] = ContextVar("request_span", default=None)


class TraceMiddleware:
    """Makes a span of each request for text; the client's ``traceparent`` is its parent.

    Args:
        app: The application inside.
        tracer: Makes the spans.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        operation = OPERATIONS.get(scope["path"]) if scope["type"] == "http" else None
        if operation is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "headlong",
            "http.request.method": "POST",
            "http.route": scope["path"],
            "headlong.request_id": state.get("request_id", ""),
        }
        span = RequestSpan(self._tracer, _parent(scope), attributes)
        # Neither is reset: the request's line is logged after this returns, and its task ends.
        TRACE_ID.set(span.trace_id)
        _SPAN.set(span)
        status: int | None = None
        error: str | None = None

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except BaseException as raised:
            # Its message may hold what the client sent.
            error = type(raised).__name__
            status = status or 500
            raise
        finally:
            told = status or CLIENT_CLOSED_REQUEST
            code = state.get("error_code") if told >= 400 else None
            span.end(told, code or error, state.get("model"))


class TraceObserver(NoObserver):
    """Tells the span of the request that is being served what the engine did for it."""

    def on_ended(self, record: EndedRequest) -> None:
        """Makes its spans; what is not served over HTTP has none."""
        if (span := _SPAN.get()) is not None:
            span.add(record)


def _parent(scope: Scope) -> Context:
    headers = Headers(scope=scope)
    parents = headers.getlist("traceparent")
    if len(parents) != 1:
        return Context()
    carrier = {"traceparent": parents[0], "tracestate": ",".join(headers.getlist("tracestate"))}
    return _propagator.extract(carrier, Context())


def _prompt(record: EndedRequest) -> "dict[str, AttributeValue]":
    misses = record.cache_misses.items()
    return {
        "gen_ai.usage.input_tokens": len(record.request.prompt_token_ids),
        "gen_ai.usage.cache_read.input_tokens": record.num_cached_tokens,
        **{f"headlong.prefix_cache.misses.{reason}": count for reason, count in misses},
    }


def _completion(completion: EndedCompletion) -> "dict[str, AttributeValue]":
    return {
        "gen_ai.usage.output_tokens": completion.num_tokens,
        "gen_ai.response.finish_reasons": (completion.reason,),
    }


def _summary(records: list[EndedRequest]) -> "Iterator[tuple[str, AttributeValue]]":
    """Of the whole request: sums over its prompts, and times of the slowest of them."""
    params = records[0].request.params
    yield "gen_ai.request.max_tokens", params.max_tokens
    yield "gen_ai.request.temperature", params.temperature
    yield "gen_ai.request.top_p", params.top_p
    yield "gen_ai.request.choice.count", records[0].request.n
    completions = [each for record in records for each in record.completions]
    yield "gen_ai.response.finish_reasons", [each.reason for each in completions]
    yield "gen_ai.usage.output_tokens", sum(each.num_tokens for each in completions)
    num_input_tokens = sum(len(record.request.prompt_token_ids) for record in records)
    yield "gen_ai.usage.input_tokens", num_input_tokens
    num_cached_tokens = sum(record.num_cached_tokens for record in records)
    yield "gen_ai.usage.cache_read.input_tokens", num_cached_tokens
    yield "gen_ai.latency.e2e", max(each.ended - each.request.arrived for each in records)
    started = [(each, each.started) for each in records if each.started is not None]
    if started:
        yield "gen_ai.latency.time_in_queue", max(at - each.request.arrived for each, at in started)
    run = [
        (each.request.arrived, at, each.first_token, each.last_token)
        for each, at in started
        if each.first_token is not None and each.last_token is not None
    ]
    if run:
        first = max(first - arrived for arrived, _, first, _ in run)
        yield "gen_ai.latency.time_to_first_token", first
        prefill = max(first - start for _, start, first, _ in run)
        yield "gen_ai.latency.time_in_model_prefill", prefill
        yield "gen_ai.latency.time_in_model_decode", max(last - first for _, _, first, last in run)
        inference = max(last - start for _, start, _, last in run)
        yield "gen_ai.latency.time_in_model_inference", inference
