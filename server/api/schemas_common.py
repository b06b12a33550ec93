"""What the requests and responses of several endpoints share."""

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
)
from pydantic_core import PydanticCustomError

from headlong.server.engine.request import MAX_PRIORITY, MAX_TIMEOUT_S
from headlong.server.engine.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS

MAX_N = 128
MAX_STOP = 4
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_CACHE_SALT_CHARS = 256

Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""A finite JSON number; neither a boolean nor a string that looks like one."""

TokenId = Annotated[int, Field(strict=True, ge=0)]
"""An index into the vocabulary."""


def _not_zero(value: int) -> int:
    if value == 0:
        raise PydanticCustomError("no_tokens", "must be -1, or 1 or more")
    return value


TruncatePromptTokens = Annotated[
    StrictInt,
    Field(ge=-1, lt=2**63, json_schema_extra={"not": {"const": 0}}),
    AfterValidator(_not_zero),
]


def _stop_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "(string)"
    return "(strings)" if isinstance(value, list) else None


StopString = Annotated[StrictStr, Field(max_length=MAX_STOP_CHARS)]

# The tags of unions are in parentheses, so that an error's field can be told without them.
Stop = Annotated[
    Annotated[StopString, Tag("(string)")]
    | Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_STOP), Tag("(strings)")],
    Discriminator(
        _stop_kind,
        custom_error_type="stop_form",
        custom_error_message="must be a string or a list of strings",
    ),
]


class RequestModel(BaseModel):
    """Base of what clients send; unknown fields are kept, so that some can be refused by name."""

    model_config = ConfigDict(extra="allow")


class ResponseModel(BaseModel):
    """Base of what clients receive; fields that are not set are not sent."""

    model_config = ConfigDict(extra="forbid")


class NamedEvent(ResponseModel):
    """An event of a stream whose `type` is its name there; the stream's last one says so itself."""

    type: str


class StreamOptions(RequestModel):
    """What a stream carries beside the text.

    Attributes:
        include_usage: End with a chunk that has the usage and no choices.
        continuous_usage_stats: Put the usage so far into every chunk.
    """

    include_usage: StrictBool | None = None
    continuous_usage_stats: StrictBool | None = None


class KVPolicySizes(BaseModel):
    """What streaming heads keep for one request, in tokens; null is the head profile's."""

    # A misspelled size would quietly be the profile's.
    model_config = ConfigDict(extra="forbid")

    sink_size: Annotated[StrictInt, Field(ge=0, lt=2**31)] | None = None
    window_size: Annotated[StrictInt, Field(ge=1, lt=2**31)] | None = None


def _kv_policy_kind(value: object) -> str | None:
    if value == "full":
        return "(full)"
    return "(sizes)" if isinstance(value, dict) else None


KVPolicyField = Annotated[
    Annotated[Literal["full"], Tag("(full)")] | Annotated[KVPolicySizes, Tag("(sizes)")],
    Discriminator(
        _kv_policy_kind,
        custom_error_type="kv_policy_form",
        custom_error_message='must be "full" or an object with sink_size and window_size',
    ),
]


class GenerationFields(RequestModel):
    """The request fields that all endpoints share that generate text.

    Fields left out, or null, take the model's defaults. `SamplingParams` says what each does, and
    `EngineRequest` what those of the request as a whole do.

    Attributes:
        user: Whom the client asks for; changes nothing.
        truncate_prompt_tokens: Keep this many tokens of the prompt, the last ones; -1 keeps what
            the context holds beside the completion.
        cache_salt: The prompt's cache is shared with requests of the same salt alone.
        priority: Lower runs first.
        timeout: Seconds until the request is given up; the server may set a lower limit.
        kv_policy: What streaming heads keep.
        cache_report: Tell in the usage why prompt tokens were not cached.
        return_token_ids: Tell the token ids of the prompt and of the completion.
    """

    model: StrictStr
    temperature: Annotated[Float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, description="0 and -1 keep all tokens")] | None = None
    min_p: Annotated[Float, Field(ge=0, le=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stop | None = None
    stop_token_ids: (
        Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_STOP_TOKEN_IDS)] | None
    ) = None
    include_stop_str_in_output: StrictBool | None = None
    ignore_eos: StrictBool | None = None
    min_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    skip_special_tokens: StrictBool | None = None
    repetition_penalty: Annotated[Float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[Float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[dict[str, Float], Field(fail_fast=True, max_length=MAX_LOGIT_BIAS)] | None
    ) = None
    stream: StrictBool | None = None
    user: StrictStr | None = None
    truncate_prompt_tokens: TruncatePromptTokens | None = None
    cache_salt: Annotated[StrictStr, Field(max_length=MAX_CACHE_SALT_CHARS)] | None = None
    priority: Annotated[StrictInt, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    timeout: Annotated[Float, Field(gt=0, le=MAX_TIMEOUT_S)] | None = None
    kv_policy: KVPolicyField | None = None
    cache_report: StrictBool | None = None
    return_token_ids: StrictBool | None = None


class SamplingFields(GenerationFields):
    """The request fields that text and chat completions share.

    Attributes:
        n: Completions of each prompt.
        best_of: Only what `n` asks for already.
    """

    n: Annotated[StrictInt, Field(ge=1, le=MAX_N)] | None = None
    best_of: Annotated[StrictInt, Field(ge=1)] | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    stream_options: StreamOptions | None = None

    @property
    def asked_max_tokens(self) -> int | None:
        """Most tokens of a completion, if the client said so."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer


class PromptTokensDetails(ResponseModel):
    """Of the prompt's tokens, those that the prefix cache had."""

    cached_tokens: int


class KVCacheUsage(ResponseModel):
    """Most bytes of KV cache that the completions held, and what a full cache would have held."""

    peak_bytes: int
    full_bytes: int


class Usage(ResponseModel):
    """What the request took.

    Attributes:
        prompt_tokens: A prompt counts once, however many completions it has.
        kv_cache: Known when all completions have ended.
        cache_misses: If asked for, prompt tokens that the prefix cache did not have, by reason.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    kv_cache: KVCacheUsage | None = None
    cache_misses: dict[str, int] | None = None


FinishedBy = Literal["stop", "length"]
LogprobCount = Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)]
