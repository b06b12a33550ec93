"""What the routes need to know to serve a model, and the way that each request takes."""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response

from headlong.server.api.disconnect import cancel_on_disconnect
from headlong.server.api.generation import Generation, new_id
from headlong.server.api.prompts import EncodedPrompt, PromptEncoder
from headlong.server.api.sampling import ModelLimits, sampling_params
from headlong.server.api.schemas_common import SamplingFields
from headlong.server.api.streaming import EventStreamResponse
from headlong.server.api.tool_styles import ToolStyle
from headlong.server.api.unsupported import STREAM_OPTIONS_FIELDS, Neutral, refuse_unsupported
from headlong.server.engine.request import EngineRequest, KVPolicy
from headlong.server.engine.sampling_params import SamplingParams, Structure
from headlong.server.errors import InvalidRequestError, ModelNotFoundError
from headlong.server.http_errors import shorten

if TYPE_CHECKING:
    from headlong.server.async_engine import AsyncEngine
    from headlong.server.queue_gate import Ticket

MAX_CHOICES = 1024
"""Most completions of one HTTP request, over all its prompts."""


class Answer(Protocol):
    """What an endpoint makes of a generation."""

    async def whole(self) -> BaseModel:
        """Runs it to its end and returns the body of the response."""
        ...

    def chunks(self) -> AsyncGenerator[BaseModel, None]:
        """Runs it and yields the data of each event; closing the generator aborts it."""
        ...


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, since when, and its places in the queue.

    Attributes:
        tenant: The API key's name, or "" where there are no keys.
        arrived: When the request was admitted, in seconds of `time.monotonic`.
        ticket: The places, for `Generation`.
    """

    tenant: str
    arrived: float
    ticket: "Ticket"


@dataclass(frozen=True, slots=True)
class Serving:
    """One engine and how it is offered.

    Attributes:
        engine: Runs the requests.
        prompts: Encodes their prompts.
        limits: What they are checked against.
        model_names: All names of the model.
        request_timeout: Seconds after which any request is given up, and the most that a request
            may ask for; None sets no limit.
        tool_style: How the model writes calls of tools; None if that is not known.
        created: When the server started, in seconds of Unix time.
    """

    engine: "AsyncEngine"
    prompts: PromptEncoder
    limits: ModelLimits
    model_names: tuple[str, ...]
    request_timeout: float | None = None
    tool_style: ToolStyle | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def require_model(self, name: str) -> None:
        """Checks that a model is served here.

        Raises:
            ModelNotFoundError: It is not.
        """
        if name not in self.model_names:
            raise ModelNotFoundError(
                f"the model {shorten(name, 100)!r} does not exist, this server has "
                + ", ".join(repr(each) for each in self.model_names),
                "model",
            )

    def check(self, request: SamplingFields, unsupported: Neutral, num_prompts: int = 1) -> None:
        """Checks what needs no tokens.

        Args:
            request: A request that fits its schema.
            unsupported: Known fields that the endpoint does not support.
            num_prompts: How many prompts it has.

        Raises:
            ModelNotFoundError: The model is not served.
            InvalidRequestError: A field is not supported, or does not fit the others.
        """
        self.require_model(request.model)
        refuse_unsupported(request.model_extra, unsupported)
        if request.stream_options is not None:
            options = request.stream_options.model_extra
            refuse_unsupported(options, STREAM_OPTIONS_FIELDS, "stream_options.")
            if not request.stream:
                raise InvalidRequestError(
                    "stream_options needs stream to be true", "stream_options"
                )
        n = request.n or 1
        max_n = self.engine.info.max_num_seqs
        if n > max_n:
            raise InvalidRequestError(
                f"n must be at most {max_n}, the completions that this server runs at once", "n"
            )
        if n * num_prompts > MAX_CHOICES:
            raise InvalidRequestError(
                f"{num_prompts} prompts with n = {n} are over {MAX_CHOICES} completions", "n"
            )
        if request.best_of not in {None, 1, n}:
            raise InvalidRequestError("best_of is not supported beyond n, leave it out", "best_of")

    async def respond(
        self,
        request: Request,
        body: SamplingFields,
        num_prompts: int,
        prepare: Callable[[Caller], Awaitable[Answer]],
    ) -> Response:
        """Admits a request, before any work is done for it, and answers it.

        Args:
            request: Its body has been read.
            body: Checked.
            num_prompts: How many engine requests it makes.
            prepare: Encodes the prompts and says what is to become of them.

        Returns:
            The JSON response, or the stream.

        Raises:
            HeadlongError: The request is not admitted, its prompts do not fit, or it failed.
            ClientDisconnect: The client left.
        """
        request.state.model = body.model
        tenant = getattr(request.state, "tenant", "")
        arrived = time.monotonic()
        with ExitStack() as held:
            ticket = held.enter_context(self.engine.admit(num_prompts))
            answer = await prepare(Caller(tenant, arrived, ticket))
            if body.stream:
                return EventStreamResponse(answer.chunks(), held.pop_all())
            whole = await cancel_on_disconnect(request.receive, answer.whole())
            content = whole.model_dump_json(exclude_unset=True)
            return Response(content, media_type="application/json")

    def generation(
        self,
        id_prefix: str,
        body: SamplingFields,
        prompts: Sequence[EncodedPrompt],
        caller: Caller,
        *,
        structure: Structure | None = None,
        only_scores: bool = False,
        keep_special_tokens: bool = False,
    ) -> Generation:
        """Makes the engine's requests of a request's prompts.

        Args:
            id_prefix: What the id begins with, a separator included.
            body: Checked.
            prompts: One or more.
            caller: Whose they are.
            structure: What completions must look like.
            only_scores: Whether no completion is wanted.
            keep_special_tokens: Show them in the text, whatever the request says.

        Raises:
            InvalidRequestError: A value does not fit the model, or two fields contradict.
            ContextLengthError: A prompt, with what is asked for, is over the context.
        """
        generation_id = new_id(id_prefix)
        params = [
            sampling_params(
                body,
                len(prompt.token_ids),
                self.limits,
                structure=structure,
                keep_special_tokens=keep_special_tokens,
            )
            for prompt in prompts
        ]
        requests = [
            self._engine_request(f"{generation_id}-{index}", body, prompt, each, caller)
            for index, (prompt, each) in enumerate(zip(prompts, params, strict=True))
        ]
        return Generation(
            self.engine,
            generation_id=generation_id,
            model=body.model,
            requests=requests,
            ticket=caller.ticket,
            cache_report=body.cache_report is True,
            only_scores=only_scores,
        )

    def _engine_request(
        self,
        request_id: str,
        body: SamplingFields,
        prompt: EncodedPrompt,
        params: SamplingParams,
        caller: Caller,
    ) -> EngineRequest:
        return EngineRequest(
            request_id,
            prompt.token_ids,
            params,
            n=body.n or 1,
            asked_max_tokens=body.asked_max_tokens is not None,
            priority=body.priority or 0,
            tenant=caller.tenant,
            cache_salt=body.cache_salt or "",
            kv_policy=_kv_policy(body),
            timeout_s=min(
                (each for each in (body.timeout, self.request_timeout) if each is not None),
                default=None,
            ),
            arrived=caller.arrived,
        )


def _kv_policy(body: SamplingFields) -> KVPolicy | None:
    asked = body.kv_policy
    if asked is None:
        return None
    if asked == "full":
        return KVPolicy(full=True)
    return KVPolicy(sink_size=asked.sink_size, window_size=asked.window_size)
