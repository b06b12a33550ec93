"""A response, whole or as the events that build it up."""

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from itertools import count

from pydantic import JsonValue

from headlong.server.api.generation import Delta, Generation
from headlong.server.api.responses_output import OutputBuilder
from headlong.server.api.schemas_common import FinishedBy, Usage
from headlong.server.api.schemas_responses import FlatFunction, FlatFunctionChoice, ResponsesRequest
from headlong.server.api.schemas_responses_output import (
    ErrorEvent,
    IncompleteDetails,
    InputTokensDetails,
    NestedError,
    OutputTokensDetails,
    ResponseEvent,
    ResponseFailure,
    ResponseObject,
    ResponseStatus,
    ResponseUsage,
    StateEvent,
)
from headlong.server.api.tool_choice import ToolPlan
from headlong.server.errors import HeadlongError
from headlong.server.http_errors import error_body

logger = logging.getLogger(__name__)


class ResponseAnswer:
    """The one answer to a request for a response.

    Both ways take the model's steps one by one, so that the events of a stream come to what the
    whole response would have been.

    Args:
        generation: Makes it.
        body: The request.
        plan: What to do about its tools.
    """

    def __init__(self, generation: Generation, body: ResponsesRequest, plan: ToolPlan) -> None:
        self._generation = generation
        self._body = body
        self._output = OutputBuilder(plan.parser())
        self._token_ids: list[int] = []
        self._finished_by: FinishedBy | None = None

    async def whole(self) -> ResponseObject:
        """Runs the answer to its end."""
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                self._take(delta)
        return self._end()

    async def chunks(self) -> AsyncGenerator[ResponseEvent, None]:
        """Yields what each step adds, and what became of the answer at last.

        Raises:
            HeadlongError: The answer failed before it began.
        """
        numbers = count()
        async with aclosing(self._events()) as events:
            async for event in events:
                event.sequence_number = next(numbers)
                yield event

    async def _events(self) -> AsyncGenerator[ResponseEvent, None]:
        begun = False
        try:
            async with aclosing(self._generation.deltas()) as deltas:
                async for delta in deltas:
                    if not begun:
                        begun = True
                        for name in ("response.created", "response.in_progress"):
                            yield StateEvent(type=name, response=self._response("in_progress"))
                    for event in self._take(delta):
                        yield event
        except Exception as error:
            if not begun:
                raise
            if not isinstance(error, HeadlongError):
                logger.exception("unexpected error in a stream")
            failure = _error_event(error)
            yield failure
            yield StateEvent(type="response.failed", response=self._failed(failure.message))
        else:
            response = self._end()
            yield StateEvent(type=f"response.{response.status}", response=response)

    def _take(self, delta: Delta) -> list[ResponseEvent]:
        if self._body.return_token_ids:
            self._token_ids += delta.token_ids
        self._finished_by = delta.finish_reason
        return self._output.push(delta)

    def _end(self) -> ResponseObject:
        completed = self._finished_by == "stop"
        response = self._response("completed" if completed else "incomplete")
        if completed:
            response.completed_at = int(time.time())
        else:
            response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        response.usage = _usage(self._generation.usage)
        if self._body.return_token_ids:
            response.prompt_token_ids = list(self._generation.requests[0].prompt_token_ids)
            response.token_ids = self._token_ids
        return response

    def _failed(self, message: str) -> ResponseObject:
        response = self._response("failed")
        response.error = ResponseFailure(code="server_error", message=message)
        response.usage = _usage(self._generation.usage)
        return response

    def _response(self, status: ResponseStatus) -> ResponseObject:
        body, params = self._body, self._generation.requests[0].params
        return ResponseObject(
            id=self._generation.id,
            object="response",
            created_at=self._generation.created,
            completed_at=None,
            status=status,
            background=False,
            error=None,
            incomplete_details=None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            max_tool_calls=None,
            metadata=body.metadata or {},
            model=self._generation.model,
            output=list(self._output.items),
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=None,
            reasoning=None,
            store=False,
            temperature=params.temperature,
            text={"format": _format(body)},
            tool_choice=_tool_choice(body),
            tools=[_tool(each) for each in body.tools or []],
            top_logprobs=params.logprobs or 0,
            top_p=params.top_p,
            truncation="disabled",
            usage=None,
            user=body.user,
        )


def _format(body: ResponsesRequest) -> JsonValue:
    form = None if body.text is None else body.text.format
    return {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_unset=True)


def _tool_choice(body: ResponsesRequest) -> JsonValue:
    choice = body.tool_choice
    if isinstance(choice, FlatFunctionChoice):
        return {"type": choice.type, "name": choice.name}
    return choice or "auto"


def _tool(function: FlatFunction) -> dict[str, JsonValue]:
    return {
        "type": "function",
        "name": function.name,
        "description": function.description,
        "parameters": function.parameters,
        "strict": function.strict is True,
    }


def _usage(usage: Usage) -> ResponseUsage:
    cached = usage.prompt_tokens_details.cached_tokens
    response = ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(
            cached_tokens=cached, cache_write_tokens=usage.prompt_tokens - cached
        ),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
        total_tokens=usage.total_tokens,
    )
    if usage.kv_cache is not None:
        response.kv_cache = usage.kv_cache
    if usage.cache_misses is not None:
        response.cache_misses = usage.cache_misses
    return response


def _error_event(error: Exception) -> ErrorEvent:
    told = error_body(error).error
    code = told.code or told.type
    return ErrorEvent(
        type="error",
        code=code,
        message=told.message,
        param=told.param,
        error=NestedError(message=told.message, type=told.type, param=told.param, code=code),
    )
