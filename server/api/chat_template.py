"""Renders conversations with the model's chat template."""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from headlong.server.api.schemas_messages import ChatMessage, Conversation
from headlong.server.api.tool_calls import template_calls
from headlong.server.api.unsupported import MESSAGE_FIELDS, refuse_unsupported
from headlong.server.errors import ConfigError, InvalidRequestError
from headlong.server.http_errors import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTS_SEPARATOR = "\n"
MAX_TEMPLATE_ERROR_CHARS = 300


class ChatTemplate:
    """One model's template, run by transformers in Jinja's immutable sandbox.

    Args:
        tokenizer: The model's.
        source: Jinja source that replaces the tokenizer's own template.

    Raises:
        ConfigError: The template is no Jinja.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", source: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._source = source
        if self.source is not None:
            _check_syntax(self.source)
        # Those have a meaning of their own, to transformers or to the templates.
        self._reserved = {
            "messages",
            *inspect.signature(tokenizer.apply_chat_template).parameters,
            *tokenizer.special_tokens_map,
        }

    @property
    def source(self) -> str | None:
        """The template that is used without tools; None if there is none."""
        if self._source or not self._tokenizer.chat_template:
            return self._source or None
        named = self._tokenizer.chat_template
        return named.get("default") if isinstance(named, dict) else str(named)

    @property
    def exists(self) -> bool:
        """Whether conversations can be rendered."""
        return bool(self._source or self._tokenizer.chat_template)

    def check(self, request: Conversation) -> None:
        """Checks what needs no rendering.

        Raises:
            InvalidRequestError: There is no template, or the request steers it in a way that it
                may not.
        """
        if not self.exists:
            raise InvalidRequestError(
                "this model has no chat template: use /v1/completions, or start the server with "
                "--chat-template",
                "messages",
            )
        for index, message in enumerate(request.messages):
            _check_message(message, f"messages.{index}.")
        if request.continue_final_message and request.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other",
                "continue_final_message",
            )
        for name in request.chat_template_kwargs or {}:
            if name in self._reserved:
                field = f"chat_template_kwargs.{name}"
                raise InvalidRequestError(f"{field} cannot be set by a request", field)

    def render(
        self, request: Conversation, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """Renders a conversation; slow, for a thread.

        Args:
            request: Checked.
            tools: What the template is to offer.

        Raises:
            InvalidRequestError: The template fails on it.
        """
        open_ended = request.continue_final_message is True
        turn = request.add_generation_prompt
        variables: dict[str, Any] = {**(request.chat_template_kwargs or {})}
        messages = [
            _template_message(message, f"messages.{index}.")
            for index, message in enumerate(request.messages)
        ]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    tools=None if tools is None else [dict(tool) for tool in tools],
                    chat_template=self._source,
                    add_generation_prompt=not open_ended if turn is None else turn,
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


def _check_syntax(source: str) -> None:
    try:
        # Without conversations it is compiled, by what will render it, and not run.
        render_jinja_template([], chat_template=source)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template has a fault in line {error.lineno}: {error.message}",
            "chat_template",
        ) from error


def _template_message(message: ChatMessage, prefix: str) -> dict[str, Any]:
    """Returns a message as templates expect it."""
    content = message.content
    if isinstance(content, list):
        content = PARTS_SEPARATOR.join(part.text for part in content)
    # Templates know the older name only.
    fields: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content or "",
    }
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        fields["tool_calls"] = template_calls(message.tool_calls, f"{prefix}tool_calls")
    return fields


def _check_message(message: ChatMessage, prefix: str) -> None:
    refuse_unsupported(message.model_extra, MESSAGE_FIELDS, prefix)
    if message.tool_calls and message.role != "assistant":
        param = f"{prefix}tool_calls"
        raise InvalidRequestError(f"{param} is for messages of the assistant only", param)
    if message.content is None and not message.tool_calls:
        param = f"{prefix}content"
        raise InvalidRequestError(f"{param} is missing", param)
