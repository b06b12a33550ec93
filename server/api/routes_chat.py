"""``POST /v1/chat/completions``."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from starlette.responses import Response

from headlong.server.api.generation import Delta, Generation, UsageReport
from headlong.server.api.logprobs import chat_logprobs
from headlong.server.api.schemas_chat import (
    AnsweredBy,
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatRequest,
    ChatResponse,
)
from headlong.server.api.serving import Caller, Serving
from headlong.server.api.streaming import event_stream_docs
from headlong.server.api.strict_json import StrictJSONRoute
from headlong.server.api.structures import structure_of
from headlong.server.api.tool_calls import call_delta, read_answer
from headlong.server.api.tool_choice import ToolPlan, plan_tools
from headlong.server.api.tool_parser import ContentText
from headlong.server.api.unsupported import CHAT_FIELDS
from headlong.server.http_errors import GENERATION_ERRORS, error_docs


def chat_router(serving: Serving) -> APIRouter:
    """Makes the endpoint for chat completions."""
    router = APIRouter(route_class=StrictJSONRoute)

    @router.post(
        "/v1/chat/completions",
        response_model=ChatResponse,
        responses=event_stream_docs() | error_docs(*GENERATION_ERRORS),
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answers a conversation."""
        serving.check(body, CHAT_FIELDS)
        plan = plan_tools(body, serving.tool_style, structure_of(body))

        async def prepare(caller: Caller) -> _Chat:
            prompt = await serving.prompts.chat_prompt(body, plan.template_tools)
            generation = serving.generation(
                "chatcmpl-",
                body,
                [prompt],
                caller,
                structure=plan.structure,
                keep_special_tokens=plan.keep_special_tokens,
            )
            return _Chat(generation, body, plan)

        return await serving.respond(request, body, 1, prepare)

    return router


class _Chat:
    """The answers to a conversation, whole or in chunks.

    Args:
        generation: Makes them.
        body: The request.
        plan: What to do about its tools.
    """

    def __init__(self, generation: Generation, body: ChatRequest, plan: ToolPlan) -> None:
        self._generation = generation
        self._body = body
        self._parsers = [plan.parser() for _ in range(generation.num_choices)]

    async def whole(self) -> ChatResponse:
        """Runs the answers to their ends."""
        completions = await self._generation.completions()
        response = ChatResponse(
            id=self._generation.id,
            object="chat.completion",
            created=self._generation.created,
            model=self._generation.model,
            choices=[self._answer(completion) for completion in completions],
            usage=self._generation.usage,
        )
        if self._body.return_token_ids:
            response.prompt_token_ids = self._prompt_token_ids
        return response

    def _answer(self, completion: Delta) -> ChatChoice:
        parser = self._parsers[completion.index]
        message = AssistantMessage(role="assistant", content=completion.text)
        if parser is not None:
            read = read_answer(parser, completion.text, cut=completion.finish_reason == "length")
            message.content = read.content
            if read.tool_calls:
                message.tool_calls = list(read.tool_calls)
        finish_reason = self._finish_reason(completion)
        assert finish_reason is not None
        choice = ChatChoice(
            index=completion.index,
            message=message,
            logprobs=chat_logprobs(completion.logprobs) if completion.logprobs else None,
            finish_reason=finish_reason,
            stop_reason=completion.stop_reason,
        )
        if self._body.return_token_ids:
            choice.token_ids = list(completion.token_ids)
        return choice

    async def chunks(self) -> AsyncGenerator[ChatChunk, None]:
        """Yields each answer's pieces as they come."""
        report = UsageReport.of(self._body.stream_options)
        told = not self._body.return_token_ids
        async with aclosing(self._choices()) as choices:
            async for choice in choices:
                chunk = self._chunk([choice], **report.fields(self._generation))
                if not told:
                    told, chunk.prompt_token_ids = True, self._prompt_token_ids
                yield chunk
        if report.at_end:
            yield self._chunk([], usage=self._generation.usage)

    @property
    def _prompt_token_ids(self) -> list[int]:
        return list(self._generation.requests[0].prompt_token_ids)

    async def _choices(self) -> AsyncGenerator[ChatChunkChoice, None]:
        """Yields what each step adds to an answer: the role first, then content, then the end."""
        greeted: set[int] = set()
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                if delta.index not in greeted:
                    greeted.add(delta.index)
                    yield self._choice(delta.index, ChatDelta(role="assistant", content=""))
                said = self._said(delta)
                if said.content or said.tool_calls or delta.logprobs or self._body.return_token_ids:
                    yield self._content(said, delta)
                if delta.finish_reason is not None:
                    yield self._end(delta)

    def _said(self, delta: Delta) -> ChatDelta:
        """Returns what a step adds, the calls in it told from the text."""
        parser = self._parsers[delta.index]
        if parser is None:
            return ChatDelta(content=delta.text)
        events = parser.push(delta.text)
        if delta.finish_reason is not None:
            events += parser.finish(cut=delta.finish_reason == "length")
        said = ChatDelta()
        text = "".join(event.text for event in events if isinstance(event, ContentText))
        calls = [call_delta(event) for event in events if not isinstance(event, ContentText)]
        if text or not calls:
            said.content = text
        if calls:
            said.tool_calls = calls
        return said

    def _content(self, said: ChatDelta, delta: Delta) -> ChatChunkChoice:
        choice = self._choice(delta.index, said)
        if delta.logprobs:
            choice.logprobs = chat_logprobs(delta.logprobs)
        if self._body.return_token_ids:
            choice.token_ids = list(delta.token_ids)
        return choice

    def _end(self, delta: Delta) -> ChatChunkChoice:
        end = self._choice(delta.index, ChatDelta())
        end.finish_reason = self._finish_reason(delta)
        end.stop_reason = delta.stop_reason
        return end

    def _finish_reason(self, delta: Delta) -> AnsweredBy | None:
        parser = self._parsers[delta.index]
        called = parser is not None and parser.num_calls > 0
        return "tool_calls" if called and delta.finish_reason == "stop" else delta.finish_reason

    @staticmethod
    def _choice(index: int, delta: ChatDelta) -> ChatChunkChoice:
        return ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)

    def _chunk(self, choices: list[ChatChunkChoice], **usage: object) -> ChatChunk:
        return ChatChunk.model_validate(
            {
                "id": self._generation.id,
                "object": "chat.completion.chunk",
                "created": self._generation.created,
                "model": self._generation.model,
                "choices": choices,
                **usage,
            }
        )
