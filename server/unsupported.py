"""Known request fields that are refused because this server does not do what they ask."""

from collections.abc import Mapping, Sequence

from headlong.server.errors import InvalidRequestError

Neutral = Mapping[str, Sequence[object]]
"""Field name to the values, beside null, that ask for nothing."""

_BOTH: Neutral = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": ("",),
    "early_stopping": (False,),
    "ebnf": (),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "json_schema": (),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "n": (1,),
    "priority": (0,),
    "prompt_logprobs": (),
    "regex": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}

COMPLETION_FIELDS: Neutral = {
    **_BOTH,
    "best_of": (1,),
    "echo": (False,),
    "prompt_embeds": (),
    "suffix": ("",),
}

CHAT_FIELDS: Neutral = {
    **_BOTH,
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "include_reasoning": (True,),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}

MESSAGE_FIELDS: Neutral = {
    "audio": (),
    "function_call": (),
    "refusal": ("",),
    "tool_call_id": (),
    "tool_calls": ([],),
}


def refuse_unsupported(
    fields: Mapping[str, object] | None, unsupported: Neutral, prefix: str = ""
) -> None:
    """Refuses what is known and not supported; what nobody knows is tolerated.

    Args:
        fields: The fields that the request's schema does not define.
        unsupported: What is refused, unless its value asks for nothing.
        prefix: Where in the request the fields lie, ending in a dot.

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
            raise InvalidRequestError(
                f"{prefix}{name} is not supported by this server, leave it out", f"{prefix}{name}"
            )
