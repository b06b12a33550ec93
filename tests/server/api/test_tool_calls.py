import pytest

from headlong.server.api.schemas_tools import SentToolCall
from headlong.server.api.tool_calls import template_calls
from headlong.server.errors import InvalidRequestError


def sent(arguments: str) -> SentToolCall:
    return SentToolCall.model_validate(
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "f", "arguments": arguments},
        }
    )


def test_templates_get_arguments_as_objects() -> None:
    calls = template_calls([sent('{"a": [1, null]}'), sent("")], "messages.1.tool_calls")
    assert [call["function"] for call in calls] == [
        {"name": "f", "arguments": {"a": [1, None]}},
        {"name": "f", "arguments": {}},
    ]
    assert (calls[0]["id"], calls[0]["type"]) == ("call_1", "function")


@pytest.mark.parametrize("arguments", ["{", "[1]", '"x"', '{"a": NaN}', "{'a': 1}", "[" * 5000])
def test_arguments_that_are_no_object_are_refused_by_field(arguments: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        template_calls([sent("{}"), sent(arguments)], "messages.1.tool_calls")
    assert caught.value.param == "messages.1.tool_calls.1.function.arguments"
