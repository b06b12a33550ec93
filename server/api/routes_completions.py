"""``POST /v1/completions``."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from fastapi import APIRouter, Request
from starlette.responses import Response

from headlong.server.api.echo import Echo, check_echo_size, make_echo
from headlong.server.api.generation import Delta, Generation, UsageReport
from headlong.server.api.logprobs import TokenOffsets, completion_logprobs, joined_logprobs
from headlong.server.api.prompts import EncodedPrompt, PromptEncoder
from headlong.server.api.schemas_completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
)
from headlong.server.api.serving import Caller, Serving
from headlong.server.api.streaming import event_stream_docs
from headlong.server.api.strict_json import StrictJSONRoute
from headlong.server.api.structures import structure_of
from headlong.server.api.unsupported import COMPLETION_FIELDS
from headlong.server.engine.outputs import PositionLogprobs
from headlong.server.errors import InvalidRequestError
from headlong.server.http_errors import GENERATION_ERRORS, error_docs


def completions_router(serving: Serving) -> APIRouter:
    """Makes the endpoint for text completions."""
    router = APIRouter(route_class=StrictJSONRoute)

    @router.post(
        "/v1/completions",
        response_model=CompletionResponse,
        responses=event_stream_docs() | error_docs(*GENERATION_ERRORS),
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continues one or several prompts."""
        serving.check(body, COMPLETION_FIELDS, body.num_prompts)
        if body.only_scores and not body.echo:
            raise InvalidRequestError("max_tokens may be 0 only with echo", "max_tokens")
        structure = structure_of(body)

        async def prepare(caller: Caller) -> _Completions:
            prompts = await serving.prompts.completion_prompts(body)
            echoes = await _echoes(serving.prompts, body, prompts)
            generation = serving.generation(
                "cmpl-",
                body,
                prompts,
                caller,
                structure=structure,
                only_scores=body.only_scores,
            )
            return _Completions(generation, body, echoes, serving.prompts)

        return await serving.respond(request, body, body.num_prompts, prepare)

    return router


async def _echoes(
    encoder: PromptEncoder, body: CompletionRequest, prompts: Sequence[EncodedPrompt]
) -> list[Echo]:
    """Returns the text of each prompt if it is wanted."""
    if not body.echo:
        return []
    if body.logprobs is not None:
        check_echo_size(prompts, body.n or 1, body.logprobs)

    def find() -> list[Echo]:
        return [
            make_echo(
                encoder,
                prompt,
                skip_special_tokens=body.skip_special_tokens is not False,
                with_offsets=body.logprobs is not None,
            )
            for prompt in prompts
        ]

    return await asyncio.to_thread(find)


class _Completions:
    """The choices of a request, whole or in chunks.

    Args:
        generation: Makes them.
        body: The request.
        echoes: What choices begin with, for each prompt; empty for nothing.
        encoder: Of the prompts.
    """

    def __init__(
        self,
        generation: Generation,
        body: CompletionRequest,
        echoes: Sequence[Echo],
        encoder: PromptEncoder,
    ) -> None:
        self._generation = generation
        self._body = body
        self._echoes = echoes
        self._encoder = encoder
        self._offsets: dict[int, TokenOffsets] = {}

    async def whole(self) -> CompletionResponse:
        """Runs the prompts to their ends."""
        completions = await self._generation.completions()
        choices = [self._choice(completion, first=True) for completion in completions]
        return self._response(choices, usage=self._generation.usage)

    async def chunks(self) -> AsyncGenerator[CompletionResponse, None]:
        """Yields each choice's pieces as they come."""
        report = UsageReport.of(self._body.stream_options)
        begun: set[int] = set()
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                first = delta.index not in begun
                choice = self._choice(delta, first=first)
                if choice.text or choice.logprobs or choice.token_ids or choice.finish_reason:
                    begun.add(delta.index)
                    yield self._response([choice], **report.fields(self._generation))
        if report.at_end:
            yield self._response([], usage=self._generation.usage)

    def _choice(self, delta: Delta, *, first: bool) -> CompletionChoice:
        """Returns what a delta adds to a choice, after the prompt where it is echoed."""
        prompt = self._generation.prompt_index(delta.index)
        echo = self._echoes[prompt] if first and self._echoes else None
        logprobs: list[CompletionLogprobs] = []
        if echo is not None and self._generation.with_logprobs:
            logprobs.append(echo.logprobs(self._generation.prompt_logprobs(delta.index)))
        if delta.logprobs:
            logprobs.append(self._logprobs(delta.index, delta.logprobs))
        choice = CompletionChoice(
            index=delta.index,
            text=delta.text if echo is None else echo.text + delta.text,
            logprobs=joined_logprobs(logprobs) if logprobs else None,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )
        if self._body.return_token_ids:
            choice.token_ids = list(delta.token_ids)
            if first:
                prompt_token_ids = self._generation.requests[prompt].prompt_token_ids
                choice.prompt_token_ids = list(prompt_token_ids)
        return choice

    def _logprobs(self, index: int, positions: Sequence[PositionLogprobs]) -> CompletionLogprobs:
        if index not in self._offsets:
            prompt = self._generation.prompt_index(index)
            self._offsets[index] = TokenOffsets(
                self._encoder.tokenizer,
                self._generation.requests[prompt].prompt_token_ids,
                len(self._echoes[prompt].text) if self._echoes else 0,
                skip_special_tokens=self._body.skip_special_tokens is not False,
            )
        offsets = self._offsets[index]
        return completion_logprobs(
            positions, [offsets.push(position.chosen.token_id) for position in positions]
        )

    def _response(self, choices: list[CompletionChoice], **usage: object) -> CompletionResponse:
        return CompletionResponse.model_validate(
            {
                "id": self._generation.id,
                "object": "text_completion",
                "created": self._generation.created,
                "model": self._generation.model,
                "choices": choices,
                **usage,
            }
        )
