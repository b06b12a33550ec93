"""What the tools of a chat request come to: for the template, the sampler and the reader."""

from dataclasses import dataclass

from headlong.server.api.schemas_tools import (
    FunctionDefinition,
    NamedToolChoice,
    TemplateTool,
    Tool,
    ToolFields,
)
from headlong.server.api.tool_grammar import tool_grammar
from headlong.server.api.tool_parser import ToolCallParser
from headlong.server.api.tool_styles import ToolStyle
from headlong.server.engine.sampling_params import MAX_STRUCTURE_CHARS, Structure
from headlong.server.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """What to do about the tools of one request.

    Attributes:
        template_tools: `tools` for the chat template; None if the model is not told of any.
        structure: What every completion must look like; None if any text will do.
        keep_special_tokens: Whether `skip_special_tokens` must be false to find the calls.
    """

    template_tools: list[TemplateTool] | None = None
    structure: Structure | None = None
    keep_special_tokens: bool = False
    _style: ToolStyle | None = None
    _names: frozenset[str] = frozenset()

    def parser(self) -> ToolCallParser | None:
        """Returns a reader for one completion's text, or None if no calls can be in it."""
        return None if self._style is None else ToolCallParser(self._style, self._names)


def plan_tools(
    request: ToolFields, style: ToolStyle | None, structure: Structure | None = None
) -> ToolPlan:
    """Decides what to do about the tools of a request.

    With `tool_choice` "none" the model is not told of its tools. "required" and a named function
    force calls by a grammar; "auto" has one only if `strict` tools or `parallel_tool_calls` need
    it.

    Args:
        request: Its `tools`, `tool_choice` and `parallel_tool_calls`.
        style: How the model writes calls, if it is known.
        structure: The form that the request asks of its text, by `structure_of`.

    Raises:
        InvalidRequestError: The fields contradict, or the model's calls cannot be read.
    """
    tools, choice = request.tools or [], request.tool_choice
    if not tools and choice not in (None, "none"):
        raise InvalidRequestError("tool_choice needs tools", "tool_choice")
    if not tools or choice == "none":
        return ToolPlan(structure=structure)
    if style is None:
        raise InvalidRequestError(
            "tools are not supported with this model: its chat template does not describe them "
            "in a way that this server can read",
            "tools",
        )
    if structure is not None:
        # Text of that form is no call, and a call is not of that form.
        raise InvalidRequestError(
            f"{structure.param} and tools exclude each other", structure.param
        )
    return ToolPlan(
        template_tools=[_template_tool(tool) for tool in tools],
        structure=_structure(request, [tool.function for tool in tools], style),
        keep_special_tokens=style.keep_special_tokens,
        _style=style,
        _names=frozenset(tool.function.name for tool in tools),
    )


def _structure(
    request: ToolFields, functions: list[FunctionDefinition], style: ToolStyle
) -> Structure | None:
    choice = request.tool_choice
    parallel = request.parallel_tool_calls is not False
    forced = choice == "required"
    if isinstance(choice, NamedToolChoice):
        name = choice.function.name
        functions = [each for each in functions if each.name == name]
        if not functions:
            raise InvalidRequestError(
                f"tool_choice names the function {name}, which is not in tools", "tool_choice"
            )
        forced, parallel = True, False
    if not forced and parallel and not any(each.strict for each in functions):
        return None
    grammar = tool_grammar(style, functions, forced=forced, parallel=parallel)
    if len(grammar) > MAX_STRUCTURE_CHARS:
        raise InvalidRequestError(
            f"tools are too long to keep calls to them: {len(grammar)} characters as a grammar, "
            f"at most {MAX_STRUCTURE_CHARS} can be; tool_choice 'auto' without strict functions "
            "does without",
            "tools",
        )
    return Structure("grammar", grammar, param="tools")


def _template_tool(tool: Tool) -> TemplateTool:
    told: TemplateTool = tool.model_dump(exclude_none=True)
    # Templates print what they are given.
    function = told["function"]
    assert isinstance(function, dict)
    function.pop("strict", None)
    function.setdefault("parameters", {"type": "object", "properties": {}})
    return told
