"""From a request's fields to the engine's sampling parameters."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headlong.server.api.prompts import check_token_ids
from headlong.server.api.schemas_chat import ChatRequest
from headlong.server.api.schemas_common import SamplingFields
from headlong.server.api.schemas_completions import CompletionRequest
from headlong.server.engine.sampling_params import SamplingParams, Structure
from headlong.server.errors import ContextLengthError, InvalidRequestError
from headlong.server.http_errors import shorten

_TOKEN_ID = re.compile(r"[0-9]{1,18}", re.ASCII)
_SAME_NAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
)


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What of the model a request is checked against.

    Attributes:
        max_model_len: Most tokens of prompt and completion together.
        vocab_size: Token ids are under it.
        default_sampling: The model's own defaults, named as the fields of `SamplingParams`.
    """

    max_model_len: int
    vocab_size: int
    default_sampling: Mapping[str, float | int]


def sampling_params(
    request: SamplingFields,
    num_prompt_tokens: int,
    limits: ModelLimits,
    *,
    structure: Structure | None = None,
    keep_special_tokens: bool = False,
) -> SamplingParams:
    """Joins a request's fields with the model's defaults.

    Args:
        request: A checked request.
        num_prompt_tokens: Length of the prompt that the parameters are for.
        limits: The model's.
        structure: What the completion must look like.
        keep_special_tokens: Show them in the text, whatever the request says.

    Raises:
        InvalidRequestError: A value does not fit the model, or two fields contradict.
        ContextLengthError: The prompt, or the prompt with what is asked for, is over the context.
    """
    given = {name: value for name in _SAME_NAME if (value := getattr(request, name)) is not None}
    values: dict[str, Any] = {
        name: value for name, value in limits.default_sampling.items() if name in _SAME_NAME
    } | given
    if values.get("top_k") == -1:
        values["top_k"] = 0
    if keep_special_tokens:
        values["skip_special_tokens"] = False
    stop = request.stop
    stop_token_ids = tuple(request.stop_token_ids or ())
    check_token_ids(stop_token_ids, limits.vocab_size, "stop_token_ids")
    logprobs = _logprobs(request)
    echoes = isinstance(request, CompletionRequest) and request.echo is True
    return SamplingParams(
        max_tokens=_max_tokens(request, num_prompt_tokens, limits),
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        stop_token_ids=stop_token_ids,
        logit_bias=_logit_bias(request.logit_bias or {}, limits.vocab_size),
        logprobs=logprobs,
        prompt_logprobs=logprobs if echoes else None,
        structure=structure,
        **values,
    )


def _max_tokens(request: SamplingFields, num_prompt_tokens: int, limits: ModelLimits) -> int:
    if request.max_tokens is not None and request.max_tokens != request.asked_max_tokens:
        raise InvalidRequestError(
            "max_tokens and max_completion_tokens differ, give one", "max_completion_tokens"
        )
    asked = request.asked_max_tokens
    # The engine scores a prompt on the way to a token.
    least = None if asked is None else max(asked, 1)
    context = limits.max_model_len
    room = context - num_prompt_tokens
    if room < (least or 1):
        wanted = f" and {shorten(str(asked), 40)} of the completion" if asked else ""
        raise ContextLengthError(
            f"this model's context is {context} tokens, and the request needs "
            f"{num_prompt_tokens} of the {_prompt_name(request)}"
            + (wanted or " and at least one of the completion"),
            _prompt_name(request),
        )
    if least is not None:
        return least
    unasked = SamplingParams().max_tokens if isinstance(request, CompletionRequest) else room
    return max(1, min(room, int(limits.default_sampling.get("max_tokens", unasked))))


def _prompt_name(request: SamplingFields) -> str:
    return "messages" if isinstance(request, ChatRequest) else "prompt"


def _logprobs(request: SamplingFields) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    if not isinstance(request, ChatRequest):
        return None
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true", "top_logprobs")
    return None


def _logit_bias(bias: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    for key in bias:
        if not _TOKEN_ID.fullmatch(key):
            raise InvalidRequestError(
                f"the keys of logit_bias must be token ids, got {shorten(key, 40)!r}", "logit_bias"
            )
    token_ids = {int(key): value for key, value in bias.items()}
    if len(token_ids) != len(bias):
        raise InvalidRequestError("logit_bias names a token id twice", "logit_bias")
    check_token_ids(token_ids, vocab_size, "logit_bias")
    return token_ids
