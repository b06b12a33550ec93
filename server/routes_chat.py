"""``POST /v1/chat/completions``."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from starlette.responses import Response

from headlong.server import generation as gen
from headlong.server.http_errors import error_docs
from headlong.server.logprobs import chat_logprobs
from headlong.server.sampling import sampling_params
from headlong.server.schemas_chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatRequest,
    ChatResponse,
    Delta,
)
from headlong.server.schemas_common import ResponseModel
from headlong.server.serving import Serving, respond
from headlong.server.streaming import EventStreamResponse, event_stream_docs
from headlong.server.strict_json import StrictJSONRoute
from headlong.server.unsupported import CHAT_FIELDS


def chat_router(serving: Serving) -> APIRouter:
    """Makes the endpoint for chat completions."""
    router = APIRouter(route_class=StrictJSONRoute)

    @router.post(
        "/v1/chat/completions",
        response_model=ChatResponse,
        responses=event_stream_docs() | error_docs(400, 404, 413, 415, 500, 503),
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answers a conversation."""
        serving.admit(body, CHAT_FIELDS)
        prompt = await serving.prompts.chat_prompt(body)
        generation = gen.Generation(
            serving.engine,
            kind="chatcmpl",
            model=body.model,
            prompts=[prompt],
            params=[sampling_params(body, len(prompt), serving.limits)],
        )
        if body.stream:
            report = gen.UsageReport.of(body.stream_options)
            return EventStreamResponse(_chunks(generation, report))
        return await respond(request, _whole(generation))

    return router


async def _whole(generation: gen.Generation) -> ChatResponse:
    completions = await generation.completions()
    choices = [
        ChatChoice(
            index=index,
            message=AssistantMessage(role="assistant", content=completion.text),
            logprobs=chat_logprobs(completion.logprobs) if generation.with_logprobs else None,
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )
        for index, completion in enumerate(completions)
    ]
    return ChatResponse(
        id=generation.id,
        object="chat.completion",
        created=generation.created,
        model=generation.model,
        choices=choices,
        usage=generation.usage,
    )


async def _chunks(
    generation: gen.Generation, report: gen.UsageReport
) -> AsyncGenerator[ResponseModel, None]:
    greeted: set[int] = set()

    def chunk(choices: list[ChatChunkChoice], **usage: object) -> ChatChunk:
        return ChatChunk.model_validate(
            {
                "id": generation.id,
                "object": "chat.completion.chunk",
                "created": generation.created,
                "model": generation.model,
                "choices": choices,
                **usage,
            }
        )

    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            for choice in _choices(delta, first=delta.index not in greeted):
                yield chunk([choice], **report.fields(generation))
            greeted.add(delta.index)
    if report.at_end:
        yield chunk([], usage=generation.usage)


def _choices(delta: gen.Delta, *, first: bool) -> list[ChatChunkChoice]:
    """Returns what a step adds: the role if it is the first one, content, the end."""
    choices: list[ChatChunkChoice] = []
    if first:
        choices.append(
            ChatChunkChoice(
                index=delta.index,
                delta=Delta(role="assistant", content=""),
                logprobs=None,
                finish_reason=None,
            )
        )
    if delta.text or delta.logprobs:
        choices.append(
            ChatChunkChoice(
                index=delta.index,
                delta=Delta(content=delta.text),
                logprobs=chat_logprobs(delta.logprobs) if delta.logprobs else None,
                finish_reason=None,
            )
        )
    if delta.finish_reason is not None:
        choices.append(
            ChatChunkChoice(
                index=delta.index,
                delta=Delta(),
                logprobs=None,
                finish_reason=delta.finish_reason,
                stop_reason=delta.stop_reason,
            )
        )
    return choices
