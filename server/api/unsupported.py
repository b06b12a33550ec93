"""Known request fields that are refused because this server does not do what they ask."""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from headlong.server.api.schemas_chat import ChatRequest
from headlong.server.api.schemas_completions import CompletionRequest
from headlong.server.api.schemas_responses import ResponsesRequest
from headlong.server.api.schemas_tokenize import DetokenizeRequest, TokenizeChat, TokenizeText
from headlong.server.errors import InvalidRequestError

Neutral = Mapping[str, Sequence[object]]
"""Field name to the values, beside null, that ask for nothing."""

REQUESTS: Sequence[type[BaseModel]] = (
    CompletionRequest,
    ChatRequest,
    ResponsesRequest,
    TokenizeText,
    TokenizeChat,
    DetokenizeRequest,
)
"""What clients send to all endpoints."""

ANNOTATIONS = frozenset({"metadata", "user"})
"""Fields that change nothing where they are known, and so may stand anywhere."""

_ELSEWHERE: Neutral = {
    "add_generation_prompt": (False,),
    "best_of": (1,),
    "cache_report": (False,),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "echo": (False,),
    "include": ([],),
    "n": (1,),
    "return_token_ids": (False,),
    "return_token_strs": (False,),
    "stream": (False,),
    "tools": ([],),
}


def _foreign(request: type[BaseModel]) -> Neutral:
    """Returns the fields that other endpoints know and this one does not."""
    known = {name for each in REQUESTS for name in each.model_fields}
    return {
        name: _ELSEWHERE.get(name, ())
        for name in sorted(known - set(request.model_fields) - ANNOTATIONS)
    }


_BOTH: Neutral = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "early_stopping": (False,),
    "ebnf": (),
    "ec_transfer_params": (),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "json_schema": (),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "thinking_token_budget": (-1,),
    "truncation_side": ("left",),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}

_TOOLS: Neutral = {
    "parallel_tool_calls": (True, False),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}

COMPLETION_FIELDS: Neutral = {
    **_foreign(CompletionRequest),
    **_BOTH,
    **_TOOLS,
    "prompt_embeds": (),
    "suffix": ("",),
}

_CONVERSATION: Neutral = {
    **_BOTH,
    "audio": (),
    "chat_template": (),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "include_reasoning": (True,),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_embeds": (),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "verbosity": ("medium",),
    "web_search_options": (),
}

CHAT_FIELDS: Neutral = {**_foreign(ChatRequest), **_CONVERSATION}

RESPONSES_FIELDS: Neutral = {
    **_foreign(ResponsesRequest),
    **_CONVERSATION,
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "logprobs": (False,),
    "max_tool_calls": (),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
    "prompt_cache_options": ({},),
    "prompt_cache_retention": ("in_memory",),
    "reasoning": (
        {},
        {"effort": None},
        {"effort": "none"},
        {"effort": None, "summary": None},
        {"effort": "none", "summary": None},
    ),
    "truncation": ("disabled",),
}
_NOT_STORED = "responses are not stored: send the whole conversation as input"
RESPONSES_HINTS: Mapping[str, str] = {
    "background": "responses are not stored: wait for it, or stream it",
    "conversation": _NOT_STORED,
    "logprobs": 'include "message.output_text.logprobs" or set top_logprobs',
    "max_completion_tokens": "set max_output_tokens",
    "max_tokens": "set max_output_tokens",
    "messages": "send them as input",
    "previous_response_id": _NOT_STORED,
    "response_format": "set text.format",
    "store": "responses are not stored: leave it out or set it to false",
    "truncation": "truncate_prompt_tokens -1 keeps the last tokens that fit",
}
"""What to do in place of those fields of responses."""

_TEMPLATE: Neutral = {
    "chat_template": (),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
}

TOKENIZE_TEXT_FIELDS: Neutral = {**_foreign(TokenizeText), **_TOOLS, **_TEMPLATE}

TOKENIZE_CHAT_FIELDS: Neutral = {**_foreign(TokenizeChat), **_TEMPLATE}

DETOKENIZE_FIELDS: Neutral = {
    **_foreign(DetokenizeRequest),
    **_TOOLS,
    # Special tokens are part of the text.
    "skip_special_tokens": (False,),
}

STREAM_OPTIONS_FIELDS: Neutral = {"include_obfuscation": (False,)}

MESSAGE_FIELDS: Neutral = {
    "audio": (),
    "function_call": (),
    "refusal": ("",),
}


def refuse_unsupported(
    fields: Mapping[str, object] | None,
    unsupported: Neutral,
    prefix: str = "",
    hints: Mapping[str, str] | None = None,
) -> None:
    """Refuses what is known and not supported; what nobody knows is tolerated.

    Args:
        fields: The fields that the request's schema does not define.
        unsupported: What is refused, unless its value asks for nothing.
        prefix: Where in the request the fields lie, ending in a dot.
        hints: What to do instead of leaving a field out.

    Raises:
        InvalidRequestError: `param` names the field.
    """
    for name, value in (fields or {}).items():
        # Equality alone would take true for 1.
        if (
            name in unsupported
            and value is not None
            and not any(type(value) is type(same) and value == same for same in unsupported[name])
        ):
            hint = (hints or {}).get(name, "leave it out")
            raise InvalidRequestError(
                f"{prefix}{name} is not supported by this server, {hint}", f"{prefix}{name}"
            )
