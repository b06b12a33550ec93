"""What the requests and responses of several endpoints share."""

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
)

from headlong.server.engine.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS

MAX_STOP = 4
MAX_STOP_TOKEN_IDS = 1024

Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""A finite JSON number; neither a boolean nor a string that looks like one."""

TokenId = Annotated[int, Field(strict=True, ge=0)]
"""An index into the vocabulary."""


def _stop_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "(string)"
    return "(strings)" if isinstance(value, list) else None


# The tags of unions are in parentheses, so that an error's field can be told without them.
Stop = Annotated[
    Annotated[StrictStr, Tag("(string)")]
    | Annotated[list[StrictStr], Field(fail_fast=True, max_length=MAX_STOP), Tag("(strings)")],
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


class StreamOptions(RequestModel):
    """What a stream carries beside the text.

    Attributes:
        include_usage: End with a chunk that has the usage and no choices.
        continuous_usage_stats: Put the usage so far into every chunk.
    """

    include_usage: StrictBool | None = None
    continuous_usage_stats: StrictBool | None = None


class SamplingFields(RequestModel):
    """The request fields that text and chat completions share.

    Fields left out, or null, take the model's defaults. `SamplingParams` says what each does.
    """

    model: StrictStr
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
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
    stream_options: StreamOptions | None = None
    user: StrictStr | None = None
    add_special_tokens: StrictBool | None = None


class Usage(ResponseModel):
    """Tokens that the request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ErrorBody(ResponseModel):
    """One error, as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(ResponseModel):
    """The body of every response that is not a success, and of an error inside a stream."""

    error: ErrorBody


FinishedBy = Literal["stop", "length"]
LogprobCount = Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)]
