"""How models write the calls that they make: the styles that this server reads."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ToolStyleName = Literal["hermes", "llama3_json"]
ToolStyleSetting = Literal["auto", "none", "hermes", "llama3_json"]


@dataclass(frozen=True, slots=True)
class ToolStyle:
    r"""How a model writes its calls.

    A call is a JSON object with the members `name` and, under one of `arguments_keys`, the
    arguments as an object. In "hermes" style (Hermes 2 Pro and 3, Qwen 2.5 and 3) each call stands
    between `begin` and `end`, anywhere in the answer. In "llama3_json" style (Llama 3.1 to 3.3) the
    calls are the whole answer, perhaps after `begin`, with semicolons between them.

    Attributes:
        name: Which style it is.
        begin: What opens a call, or the calls.
        end: What closes a call; "" if nothing does.
        arguments_keys: Names of the arguments, the one that the model is used to first.
        tokens: Those of `begin` and `end` that are one token of the model.
        special_tokens: Those of them that text without special tokens does not show.
    """

    name: ToolStyleName
    begin: str
    end: str
    arguments_keys: tuple[str, ...]
    tokens: frozenset[str] = frozenset()
    special_tokens: frozenset[str] = frozenset()

    @property
    def keep_special_tokens(self) -> bool:
        """Whether calls can only be told in text that shows special tokens."""
        return bool(self.end and self.special_tokens)


HERMES = ToolStyle("hermes", "<tool_call>", "</tool_call>", ("arguments",))
LLAMA3_JSON = ToolStyle("llama3_json", "<|python_tag|>", "", ("parameters", "arguments"))


def detect_tool_style(chat_template: str) -> ToolStyle | None:
    """Tells from a chat template how its model writes calls.

    Args:
        chat_template: Jinja source.

    Returns:
        The style, or None if the template knows no tools or none of these styles.
    """
    if HERMES.begin in chat_template:
        # Others put XML between the same marks: Qwen3-Coder's and GLM's.
        other = "<function=" in chat_template or "<arg_key>" in chat_template
        return HERMES if "arguments" in chat_template and not other else None
    # Its instructions to the model show the form of a call.
    if '"parameters": dictionary of argument name' in chat_template:
        return LLAMA3_JSON
    return None


def choose_tool_style(
    setting: ToolStyleSetting,
    tokenizer: "PreTrainedTokenizerBase",
    chat_template: str | None = None,
) -> ToolStyle | None:
    """Decides how the calls of a model are read.

    Args:
        setting: A style, "none", or "auto" to tell it from the chat template.
        tokenizer: The model's.
        chat_template: Jinja source in place of the tokenizer's own.

    Returns:
        The style, or None if tools are not to be had.
    """
    if setting == "none":
        return None
    if setting == "auto":
        template = chat_template or tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("tool_use", template.get("default"))
        style = detect_tool_style(template) if template else None
    else:
        style = HERMES if setting == "hermes" else LLAMA3_JSON
    if style is None:
        return None
    added = tokenizer.added_tokens_decoder.values()
    marks = {style.begin, style.end}
    return replace(
        style,
        tokens=frozenset(marks & {str(token) for token in added}),
        special_tokens=frozenset(marks & {str(token) for token in added if token.special}),
    )
