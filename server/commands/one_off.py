"""Generates for one prompt without a server."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError

from headlong.server.api.generation import Generation, new_id
from headlong.server.api.prompts import PromptEncoder
from headlong.server.api.sampling import ModelLimits, sampling_params
from headlong.server.api.schemas_chat import ChatRequest
from headlong.server.api.schemas_common import SamplingFields
from headlong.server.api.schemas_completions import CompletionRequest
from headlong.server.engine.request import EngineRequest
from headlong.server.errors import InvalidRequestError
from headlong.server.http_errors import describe_faults

if TYPE_CHECKING:
    from headlong.server.async_engine import AsyncEngine

S = TypeVar("S", bound=SamplingFields)

DEFAULT_MAX_TOKENS = 256


async def generate_text(
    engine: "AsyncEngine",
    prompt: str,
    *,
    chat: bool | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
) -> AsyncGenerator[str, None]:
    """Generates text on an engine that is not running yet; it is shut down at the end.

    Args:
        engine: Started here.
        prompt: A user's message, or text to continue.
        chat: Whether it is a message; by default, if the model has a chat template.
        max_tokens: Most tokens to generate; by default 256, or what the context leaves.
        temperature: 0 is greedy; by default the model's own.
        top_p: By default the model's own.

    Yields:
        The text, in pieces.

    Raises:
        HeadlongError: The prompt does not fit, a value is out of range, or the engine failed.
    """
    encoder = PromptEncoder(
        engine.tokenizer, vocab_size=engine.vocab_size, max_model_len=engine.max_model_len
    )
    defaults = {"max_tokens": DEFAULT_MAX_TOKENS, **engine.default_sampling}
    limits = ModelLimits(engine.max_model_len, engine.vocab_size, defaults)
    settings = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    request: SamplingFields
    if encoder.template.exists if chat is None else chat:
        message = {"role": "user", "content": prompt}
        request = _checked(ChatRequest, messages=[message], **settings)
        encoded = await encoder.chat_prompt(request)
    else:
        request = _checked(CompletionRequest, prompt=prompt, **settings)
        [encoded] = await encoder.completion_prompts(request)
    params = sampling_params(request, len(encoded.token_ids), limits)
    generation_id = new_id("gen-")
    generation = Generation(
        engine,
        generation_id=generation_id,
        model="",
        requests=[EngineRequest(generation_id, encoded.token_ids, params)],
    )
    await engine.start()
    try:
        async with aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                yield delta.text
    finally:
        await engine.shutdown()


def _checked(schema: type[S], **fields: object) -> S:
    try:
        return schema.model_validate({"model": "", **fields})
    except ValidationError as error:
        raise InvalidRequestError(*describe_faults(error.errors(include_url=False))) from error
