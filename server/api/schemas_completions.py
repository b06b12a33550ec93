"""Bodies of ``POST /v1/completions``."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, StrictBool, StrictInt, StrictStr, Tag

from headlong.server.api.schemas_common import (
    FinishedBy,
    LogprobCount,
    ResponseModel,
    SamplingFields,
    TokenId,
    Usage,
)
from headlong.server.api.schemas_structures import StructureFields

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


class CompletionRequest(StructureFields, SamplingFields):
    """Continue one or several prompts; several give several choices, in order.

    Attributes:
        max_tokens: 0 only scores the prompt, which needs `echo`.
        logprobs: Report the log probability of each token, and this many alternatives.
        echo: Begin each choice with its prompt, and the log probabilities of the prompt's tokens
            if these are reported.
        add_special_tokens: Add the tokenizer's special tokens to texts; default yes.
    """

    prompt: Prompt
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    logprobs: LogprobCount | None = None
    echo: StrictBool | None = None
    add_special_tokens: StrictBool | None = None

    @property
    def only_scores(self) -> bool:
        """Whether nothing is to be generated."""
        return self.max_tokens == 0

    @property
    def num_prompts(self) -> int:
        """How many prompts it has."""
        prompt = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return 1
        return len(prompt)


class CompletionLogprobs(ResponseModel):
    """Natural-log probabilities, one entry for each token.

    The first token of a prompt has none, since nothing predicts it.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(ResponseModel):
    """One completion of a prompt, or what a chunk adds to it.

    Attributes:
        prompt_token_ids: With `return_token_ids`, in the first chunk.
        token_ids: With `return_token_ids`.
    """

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishedBy | None
    stop_reason: int | str | None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class CompletionResponse(ResponseModel):
    """All completions, or one chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
