"""A field that any endpoint knows is supported or refused by each."""

import pytest

from headlong.server.api.unsupported import (
    ANNOTATIONS,
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    DETOKENIZE_FIELDS,
    REQUESTS,
    RESPONSES_FIELDS,
    TOKENIZE_CHAT_FIELDS,
    TOKENIZE_TEXT_FIELDS,
)

MESSAGES = [{"role": "user", "content": "hi"}]
FORMS = {
    "CompletionRequest": ("/v1/completions", {"prompt": "hi"}, COMPLETION_FIELDS),
    "ChatRequest": ("/v1/chat/completions", {"messages": MESSAGES}, CHAT_FIELDS),
    "ResponsesRequest": ("/v1/responses", {"input": "hi"}, RESPONSES_FIELDS),
    "TokenizeText": ("/tokenize", {"prompt": "hi"}, TOKENIZE_TEXT_FIELDS),
    "TokenizeChat": ("/tokenize", {"messages": MESSAGES}, TOKENIZE_CHAT_FIELDS),
    "DetokenizeRequest": ("/detokenize", {"tokens": [1]}, DETOKENIZE_FIELDS),
}
KNOWN = {name for request in REQUESTS for name in request.model_fields} - ANNOTATIONS


@pytest.mark.parametrize("request_type", REQUESTS, ids=lambda each: each.__name__)
def test_no_known_field_is_ignored(client, engine, request_type):
    path, least, _ = FORMS[request_type.__name__]
    assert client.post(path, json={"model": "alias", **least}).status_code == 200
    engine.seen.clear()
    foreign = KNOWN - set(request_type.model_fields)
    if request_type.__name__ == "TokenizeText":
        foreign.remove("messages")  # they choose the other form
    for name in sorted(foreign):
        response = client.post(path, json={"model": "alias", **least, name: {"odd": 1}})
        assert response.status_code == 400, name
        assert response.json()["error"]["param"] == name
    assert not engine.seen


@pytest.mark.parametrize("form", FORMS)
def test_what_asks_for_nothing_is_tolerated(client, form):
    path, least, table = FORMS[form]
    nulls = dict.fromkeys(set(table) - set(least))
    neutral = {name: values[0] for name, values in table.items() if values}
    for fields in (nulls, neutral):
        assert client.post(path, json={"model": "alias", **fields, **least}).status_code == 200


@pytest.mark.parametrize(
    ("form", "fields", "param"),
    [
        ("TokenizeText", {"messages": MESSAGES}, "prompt"),
        ("TokenizeText", {"messages": 3}, "messages"),
        ("TokenizeText", {"tools": [{}]}, "tools"),
        ("DetokenizeRequest", {"skip_special_tokens": True}, "skip_special_tokens"),
        ("CompletionRequest", {"messages": MESSAGES}, "messages"),
        ("CompletionRequest", {"top_logprobs": 2}, "top_logprobs"),
        ("ChatRequest", {"prompt": "hi"}, "prompt"),
        ("ChatRequest", {"suffix": "x"}, "suffix"),
        *(
            (
                form,
                {"stream": True, "stream_options": {"include_obfuscation": True}},
                "stream_options.include_obfuscation",
            )
            for form in ("CompletionRequest", "ChatRequest", "ResponsesRequest")
        ),
    ],
)
def test_fields_of_other_endpoints(client, form, fields, param):
    path, least, _ = FORMS[form]
    response = client.post(path, json={"model": "alias", **least, **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
