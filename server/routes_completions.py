"""``POST /v1/completions``."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from starlette.responses import Response

from headlong.server.generation import Delta, Generation, UsageReport
from headlong.server.http_errors import error_docs
from headlong.server.logprobs import completion_logprobs
from headlong.server.sampling import sampling_params
from headlong.server.schemas_common import FinishedBy, ResponseModel
from headlong.server.schemas_completions import (
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
)
from headlong.server.serving import Serving, respond
from headlong.server.streaming import EventStreamResponse, event_stream_docs
from headlong.server.strict_json import StrictJSONRoute
from headlong.server.unsupported import COMPLETION_FIELDS


def completions_router(serving: Serving) -> APIRouter:
    """Makes the endpoint for text completions."""
    router = APIRouter(route_class=StrictJSONRoute)

    @router.post(
        "/v1/completions",
        response_model=CompletionResponse,
        responses=event_stream_docs() | error_docs(400, 404, 413, 415, 500, 503),
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continues one or several prompts."""
        serving.admit(body, COMPLETION_FIELDS)
        prompts = await serving.prompts.completion_prompts(body)
        generation = Generation(
            serving.engine,
            kind="cmpl",
            model=body.model,
            prompts=prompts,
            params=[sampling_params(body, len(prompt), serving.limits) for prompt in prompts],
        )
        if body.stream:
            return EventStreamResponse(_chunks(generation, UsageReport.of(body.stream_options)))
        return await respond(request, _whole(generation))

    return router


async def _whole(generation: Generation) -> CompletionResponse:
    completions = await generation.completions()
    choices = [
        CompletionChoice(
            index=index,
            text=completion.text,
            logprobs=completion_logprobs(completion.logprobs, 0)
            if generation.with_logprobs
            else None,
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )
        for index, completion in enumerate(completions)
    ]
    return CompletionResponse(
        id=generation.id,
        object="text_completion",
        created=generation.created,
        model=generation.model,
        choices=choices,
        usage=generation.usage,
    )


async def _chunks(
    generation: Generation, report: UsageReport
) -> AsyncGenerator[ResponseModel, None]:
    text_offsets = [0] * generation.num_choices

    def choice(delta: Delta, finish_reason: FinishedBy | None) -> CompletionChoice:
        logprobs = None
        if delta.logprobs:
            logprobs = completion_logprobs(delta.logprobs, text_offsets[delta.index])
            text_offsets[delta.index] += sum(map(len, logprobs.tokens))
        return CompletionChoice(
            index=delta.index,
            text=delta.text,
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_reason=delta.stop_reason,
        )

    def chunk(choices: list[CompletionChoice], **usage: object) -> CompletionResponse:
        return CompletionResponse.model_validate(
            {
                "id": generation.id,
                "object": "text_completion",
                "created": generation.created,
                "model": generation.model,
                "choices": choices,
                **usage,
            }
        )

    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            yield chunk([choice(delta, delta.finish_reason)], **report.fields(generation))
    if report.at_end:
        yield chunk([], usage=generation.usage)
