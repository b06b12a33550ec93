"""Bodies of ``POST /tokenize``, ``POST /detokenize``, ``GET /tokenizer_info``, ``GET /version``."""

from typing import Annotated

from pydantic import Discriminator, Field, StrictBool, StrictStr, Tag

from headlong.server.api.schemas_common import RequestModel, ResponseModel, TokenId
from headlong.server.api.schemas_messages import Conversation
from headlong.server.api.schemas_tools import ToolFields

MAX_DETOKENIZE_TOKENS = 1_000_000


class TokenizeFields(RequestModel):
    """What both forms of the request have.

    Attributes:
        model: May be left out.
        return_token_strs: Tell each token as the vocabulary has it.
    """

    model: StrictStr | None = None
    return_token_strs: StrictBool | None = None


class TokenizeText(TokenizeFields):
    """Tokenize a text.

    Attributes:
        prompt: The text.
        add_special_tokens: Add the tokenizer's special tokens; default yes.
    """

    prompt: StrictStr
    add_special_tokens: StrictBool | None = None


class TokenizeChat(Conversation, ToolFields, TokenizeFields):
    """Render a conversation and tokenize it."""


def _form(value: object) -> str:
    # With both, the prompt is refused as what it is: a field of the other form.
    is_chat = isinstance(value, dict) and value.get("messages") is not None
    return "(chat)" if is_chat else "(text)"


TokenizeRequest = Annotated[
    Annotated[TokenizeText, Tag("(text)")] | Annotated[TokenizeChat, Tag("(chat)")],
    Discriminator(_form),
]


class TokenizeResponse(ResponseModel):
    """Tokens of a text.

    Attributes:
        count: How many they are.
        max_model_len: Most tokens of prompt and completion of a request.
        tokens: Their ids.
        token_strs: As the vocabulary has them.
    """

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestModel):
    """Turn token ids into text.

    Attributes:
        model: May be left out.
        tokens: The ids.
    """

    model: StrictStr | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_DETOKENIZE_TOKENS)]


class DetokenizeResponse(ResponseModel):
    """The text of token ids, special tokens included."""

    prompt: str


class TokenizerInfo(ResponseModel):
    """The tokenizer; special tokens that it does not have are null.

    Attributes:
        tokenizer_class: In transformers.
        vocab_size: Token ids are under it.
        model_max_length: Most tokens of prompt and completion of a request.
        special_tokens: All special tokens.
        chat_template: Jinja source; null if conversations cannot be rendered.
    """

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    special_tokens: list[str]
    chat_template: str | None


class Version(ResponseModel):
    """The server's version."""

    version: str
