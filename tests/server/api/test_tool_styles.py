from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from headlong.server.api.tool_styles import (
    HERMES,
    LLAMA3_JSON,
    ToolStyle,
    ToolStyleSetting,
    choose_tool_style,
    detect_tool_style,
)
from support.tiny_models import save_byte_tokenizer

QWEN = (
    '{{- "For each function call, return a json object with function name and arguments within '
    '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{\\"name\\": <function-name>, '
    '\\"arguments\\": <args-json-object>}\\n</tool_call><|im_end|>\\n" }}'
)
LLAMA = (
    """{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument """
    """name and its value}.' }}"""
)
XML = "{{- '<tool_call>\\n<function=' + tool_call.name + '>\\n' + tool_call.arguments }}"
PLAIN = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "style"),
    [(QWEN, HERMES), (LLAMA, LLAMA3_JSON), (XML, None), (PLAIN, None), ("", None)],
)
def test_the_template_tells_the_style(template: str, style: ToolStyle | None) -> None:
    assert detect_tool_style(template) == style


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    save_byte_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("setting", "own", "given", "name"),
    [
        ("auto", QWEN, None, "hermes"),
        ("auto", QWEN, LLAMA, "llama3_json"),
        ("auto", {"default": PLAIN, "tool_use": QWEN}, None, "hermes"),
        ("auto", None, None, None),
        ("auto", PLAIN, None, None),
        ("none", QWEN, None, None),
        ("llama3_json", QWEN, None, "llama3_json"),
        ("hermes", None, None, "hermes"),
    ],
)
def test_a_setting_goes_before_the_template(
    tokenizer: PreTrainedTokenizerBase,
    setting: ToolStyleSetting,
    own: str | dict[str, str] | None,
    given: str | None,
    name: str | None,
) -> None:
    tokenizer.chat_template = own
    style = choose_tool_style(setting, tokenizer, given)
    assert (style.name if style else None) == name


@pytest.mark.parametrize("special", [True, False])
def test_a_mark_that_is_a_special_token_must_be_shown(
    tokenizer: PreTrainedTokenizerBase, special: bool
) -> None:
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"], special_tokens=special)
    tokenizer.add_tokens(["<|python_tag|>"], special_tokens=True)
    hermes = choose_tool_style("hermes", tokenizer)
    llama = choose_tool_style("llama3_json", tokenizer)
    assert hermes is not None
    assert llama is not None
    assert hermes.tokens == {"<tool_call>", "</tool_call>"}
    assert hermes.special_tokens == (hermes.tokens if special else set())
    assert hermes.keep_special_tokens == special
    # Calls in this style are found without the mark.
    assert llama.special_tokens == {"<|python_tag|>"}
    assert not llama.keep_special_tokens
