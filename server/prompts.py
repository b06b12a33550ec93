"""Turns what a request says into token ids, off the event loop."""

import asyncio
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from headlong.server.errors import ContextLengthError, InvalidRequestError
from headlong.server.http_errors import shorten
from headlong.server.schemas_chat import ChatMessage, ChatRequest
from headlong.server.schemas_completions import CompletionRequest
from headlong.server.unsupported import MESSAGE_FIELDS, refuse_unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTS_SEPARATOR = "\n"
MAX_TEMPLATE_ERROR_CHARS = 300


class PromptEncoder:
    """Encodes the prompts of one model.

    Args:
        tokenizer: The model's.
        vocab_size: Token ids that a client sends must be under it.
        max_model_len: Texts that cannot fit it are refused before they are tokenized.
        chat_template: Jinja source that replaces the tokenizer's own template.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        vocab_size: int,
        max_model_len: int,
        chat_template: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._chat_template = chat_template
        # No token stands for more characters than the longest one has, so a text of more than
        # this many overflows the context; tokenizing it would only burn the time of others.
        self._max_chars = max_model_len * max(map(len, tokenizer.get_vocab()), default=1)
        # Those have a meaning of their own, to transformers or to the templates.
        self._reserved = {
            "messages",
            *inspect.signature(tokenizer.apply_chat_template).parameters,
            *tokenizer.special_tokens_map,
        }

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be encoded."""
        return bool(self._chat_template or self._tokenizer.chat_template)

    async def completion_prompts(self, request: CompletionRequest) -> list[list[int]]:
        """Encodes the prompts of a text completion.

        Args:
            request: Its prompt is text, texts, token ids or lists of token ids.

        Returns:
            The token ids of each prompt, none empty.

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
        if texts:
            special = request.add_special_tokens is not False
            return await asyncio.to_thread(self._encode, texts, special, "prompt")
        if not token_ids:
            token_ids = [[item for item in prompt if isinstance(item, int)]]
        for ids in token_ids:
            check_token_ids(ids, self._vocab_size, "prompt")
        return token_ids

    async def chat_prompt(self, request: ChatRequest) -> list[int]:
        """Renders a conversation with the chat template and encodes it.

        Args:
            request: Its messages, and what it says of the template.

        Returns:
            The prompt's token ids.

        Raises:
            InvalidRequestError: There is no template, or it fails on these messages.
            ContextLengthError: The conversation cannot fit the context.
        """
        if not self.has_chat_template:
            raise InvalidRequestError(
                "this model has no chat template: use /v1/completions, or start the server with "
                "--chat-template",
                "messages",
            )
        messages = [
            _template_message(message, f"messages.{index}.")
            for index, message in enumerate(request.messages)
        ]
        open_ended = request.continue_final_message is True
        turn = request.add_generation_prompt
        if open_ended and turn:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other",
                "continue_final_message",
            )
        # A template writes the model's special tokens itself.
        special = request.add_special_tokens is True
        variables: Mapping[str, Any] = request.chat_template_kwargs or {}
        for name in variables:
            if name in self._reserved:
                field = f"chat_template_kwargs.{name}"
                raise InvalidRequestError(f"{field} cannot be set by a request", field)

        def encode() -> list[int]:
            text = self._render(
                messages, not open_ended if turn is None else turn, open_ended, variables
            )
            return self._encode([text], special, "messages")[0]

        return await asyncio.to_thread(encode)

    def _render(
        self,
        messages: list[dict[str, str]],
        generation_prompt: bool,
        open_ended: bool,
        variables: Mapping[str, Any],
    ) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    chat_template=self._chat_template,
                    add_generation_prompt=generation_prompt,
                    continue_final_message=open_ended,
                    tokenize=False,
                    **variables,
                )
            )
        except Exception as error:
            # A template is a program of the model's author, run on what the client sent: it
            # raises what it likes, and its complaint is for the client.
            reason = shorten(str(error), MAX_TEMPLATE_ERROR_CHARS)
            raise InvalidRequestError(
                f"the model's chat template refused the messages: {reason}", "messages"
            ) from error

    def _encode(self, texts: Sequence[str], special: bool, param: str) -> list[list[int]]:
        for text in texts:
            if len(text) > self._max_chars:
                raise ContextLengthError(
                    f"this model's context is {self._max_model_len} tokens, and {param} of "
                    f"{len(text)} characters cannot fit it",
                    param,
                )
        encoding = self._tokenizer(
            list(texts),
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        prompts: list[list[int]] = encoding["input_ids"]
        if not all(prompts):
            raise InvalidRequestError(f"{param} has no tokens", param)
        return prompts


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


def _template_message(message: ChatMessage, prefix: str) -> dict[str, str]:
    refuse_unsupported(message.model_extra, MESSAGE_FIELDS, prefix)
    content = message.content
    if not isinstance(content, str):
        content = PARTS_SEPARATOR.join(part.text for part in content)
    # Templates know the older name only.
    role = "system" if message.role == "developer" else message.role
    named = {} if message.name is None else {"name": message.name}
    return {"role": role, "content": content, **named}
