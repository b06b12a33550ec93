"""Bodies of ``POST /v1/completions``."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, StrictStr, Tag

from headlong.server.schemas_common import (
    FinishedBy,
    LogprobCount,
    ResponseModel,
    SamplingFields,
    TokenId,
    Usage,
)

MAX_PROMPTS = 256

TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]


def _prompt_kind(value: object) -> str | None:
    # The first element decides, so that a list of a million entries is checked once and not
    # against each of the four forms in turn.
    if isinstance(value, str):
        return "(text)"
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, str):
        return "(texts)"
    if isinstance(first, list):
        return "(token_id_lists)"
    return "(token_ids)" if isinstance(first, int) else None


Prompt = Annotated[
    Annotated[StrictStr, Field(min_length=1), Tag("(text)")]
    | Annotated[
        list[Annotated[StrictStr, Field(min_length=1)]],
        Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS),
        Tag("(texts)"),
    ]
    | Annotated[TokenIds, Tag("(token_ids)")]
    | Annotated[
        list[TokenIds],
        Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS),
        Tag("(token_id_lists)"),
    ],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_form",
        custom_error_message="must be a non-empty string, list of strings, list of token ids or "
        "list of lists of token ids",
    ),
]


class CompletionRequest(SamplingFields):
    """Continue one or several prompts; several give several choices, in order."""

    prompt: Prompt
    logprobs: LogprobCount | None = None


class CompletionLogprobs(ResponseModel):
    """Natural-log probabilities, one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(ResponseModel):
    """The completion of one prompt, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishedBy | None
    stop_reason: int | str | None


class CompletionResponse(ResponseModel):
    """All completions, or one chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
