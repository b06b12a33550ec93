"""Turns what a request says into token ids, off the event loop."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headlong.server.api.chat_template import ChatTemplate
from headlong.server.api.schemas_chat import ChatRequest
from headlong.server.api.schemas_common import SamplingFields
from headlong.server.api.schemas_completions import CompletionRequest
from headlong.server.api.schemas_messages import Conversation
from headlong.server.errors import ContextLengthError, InvalidRequestError
from headlong.server.http_errors import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TOKENIZE_CHARS = 1_000_000
"""Longest text that is tokenized for its own sake: one over the context can still be counted."""


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt.

    Attributes:
        token_ids: At least one.
        text: What the client wrote; None if it sent token ids, or if the text was truncated.
    """

    token_ids: list[int]
    text: str | None = None


class PromptEncoder:
    """Encodes the prompts of one model.

    Args:
        tokenizer: The model's.
        vocab_size: Token ids that a client sends must be under it.
        max_model_len: Texts that cannot fit it are refused before they are tokenized.
        chat_template: Jinja source that replaces the tokenizer's own template.

    Attributes:
        tokenizer: The model's.
        template: The chat template.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        vocab_size: int,
        max_model_len: int,
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, chat_template)
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        # No token stands for more characters than the longest one has, so a text of more than
        # this many overflows the context; tokenizing it would only burn the time of others.
        self._max_chars = max_model_len * max(map(len, tokenizer.get_vocab()), default=1)

    async def completion_prompts(self, request: CompletionRequest) -> list[EncodedPrompt]:
        """Encodes the prompts of a text completion.

        Args:
            request: Its prompt is text, texts, token ids or lists of token ids.

        Raises:
            InvalidRequestError: A token id is outside the vocabulary, or a text has no tokens.
            ContextLengthError: A text cannot fit the context.
        """
        prompt = request.prompt
        texts: list[str] = []
        token_ids: list[list[int]] = []
        for item in [prompt] if isinstance(prompt, str) else prompt:
            if isinstance(item, str):
                texts.append(item)
            elif isinstance(item, list):
                token_ids.append(item)
        keep = self._tokens_to_keep(request)
        if texts:
            special = request.add_special_tokens is not False
            return await asyncio.to_thread(self._encode_within, texts, special, keep, "prompt")
        if not token_ids:
            token_ids = [[item for item in prompt if isinstance(item, int)]]
        for ids in token_ids:
            check_token_ids(ids, self._vocab_size, "prompt")
        return [EncodedPrompt(_last(ids, keep)) for ids in token_ids]

    async def chat_prompt(
        self, request: ChatRequest, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> EncodedPrompt:
        """Renders a conversation with the chat template and encodes it.

        Args:
            request: Its messages, and what it says of the template.
            tools: What the template is to offer.

        Raises:
            InvalidRequestError: There is no template, or it fails on these messages.
            ContextLengthError: The conversation cannot fit the context.
        """
        self.template.check(request)
        keep = self._tokens_to_keep(request)
        # A template writes the model's special tokens itself.
        special = request.add_special_tokens is True

        def encode() -> EncodedPrompt:
            text = self.template.render(request, tools)
            return self._encode_within([text], special, keep, "messages")[0]

        return await asyncio.to_thread(encode)

    async def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Encodes a text, whether or not it fits the context.

        Args:
            text: May be empty.
            special: Add the tokenizer's special tokens.

        Raises:
            InvalidRequestError: It is longer than texts may be.
        """
        return await asyncio.to_thread(self._encode_any, text, special, "prompt")

    async def tokenize_chat(
        self, request: Conversation, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Renders and encodes a conversation, whether or not it fits the context.

        Args:
            request: Its messages, and what it says of the template.
            tools: What the template is to offer.

        Raises:
            InvalidRequestError: There is no template, it fails on these messages, or they are
                longer than texts may be.
        """
        self.template.check(request)
        special = request.add_special_tokens is True

        def encode() -> list[int]:
            return self._encode_any(self.template.render(request, tools), special, "messages")

        return await asyncio.to_thread(encode)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Returns the text of token ids, special tokens included.

        Raises:
            InvalidRequestError: One is not in the vocabulary.
        """
        check_token_ids(token_ids, self._vocab_size, "tokens")
        return await asyncio.to_thread(self.decode, token_ids, skip_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Returns the text of token ids; slow, for a thread.

        Args:
            token_ids: In the vocabulary.
            skip_special_tokens: Leave special tokens out.
        """
        text = self.tokenizer.decode(
            list(token_ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str)
        return text

    def _tokens_to_keep(self, request: SamplingFields) -> int | None:
        keep = request.truncate_prompt_tokens
        if keep != -1:
            return keep
        return max(1, self._max_model_len - (request.asked_max_tokens or 1))

    def _encode_within(
        self, texts: Sequence[str], special: bool, keep: int | None, param: str
    ) -> list[EncodedPrompt]:
        """Encodes texts, without those that cannot fit the context."""
        for text in texts:
            if len(text) > self._max_chars and keep is None:
                raise ContextLengthError(
                    f"this model's context is {self._max_model_len} tokens, and {param} of "
                    f"{len(text)} characters cannot fit it",
                    param,
                )
        # What lies before these characters cannot be among the last tokens that fit the context.
        prompts: list[EncodedPrompt] = []
        # One by one, so that the first that does not fit spares the others.
        for text in texts:
            token_ids = self._encode(text[-self._max_chars :], special)
            if not token_ids:
                raise InvalidRequestError(f"{param} has no tokens", param)
            if len(token_ids) > self._max_model_len and keep is None:
                raise ContextLengthError(
                    f"this model's context is {self._max_model_len} tokens, and {param} has "
                    f"{len(token_ids)}",
                    param,
                )
            kept = _last(token_ids, keep)
            whole = len(kept) == len(token_ids) and len(text) <= self._max_chars
            prompts.append(EncodedPrompt(kept, text if whole else None))
        return prompts

    def _encode_any(self, text: str, special: bool, param: str) -> list[int]:
        limit = max(MAX_TOKENIZE_CHARS, self._max_chars)
        if len(text) > limit:
            raise InvalidRequestError(
                f"{param} has {len(text)} characters, no more than {limit} are tokenized", param
            )
        return self._encode(text, special)

    def _encode(self, text: str, special: bool) -> list[int]:
        encoding = self.tokenizer(
            text,
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        token_ids: list[int] = encoding["input_ids"]
        return token_ids


def check_token_ids(token_ids: Iterable[int], vocab_size: int, param: str) -> None:
    """Checks that token ids are in the vocabulary.

    Raises:
        InvalidRequestError: One is not; `param` names the field.
    """
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            shown = shorten(str(token_id), 40)
            raise InvalidRequestError(
                f"{param} has the token id {shown}, the vocabulary has {vocab_size} tokens", param
            )


def _last(token_ids: list[int], count: int | None) -> list[int]:
    return token_ids if count is None else token_ids[-count:]
