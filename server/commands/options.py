"""Makes the options of a command out of the settings that it takes."""

import inspect
import json
import types
from collections.abc import Callable, Collection
from dataclasses import MISSING, fields
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import SecretStr
from pydantic_settings import BaseSettings
from rich.markup import escape

from headlong.server.config_sources import flag_name
from headlong.server.engine.engine_config import UNBOUNDED, EngineConfig
from headlong.server.engine_settings import EngineSettings
from headlong.server.flag import flag_of

if TYPE_CHECKING:
    from pydantic import JsonValue

GIVEN = "given"
"""The parameter of a command that receives its settings."""

# A switch takes no value, and a list takes one at a time.
_METAVARS: dict[Any, str] = {bool: "", list[str]: "<str>"}
_ENGINE_DEFAULTS = {each.name: each.default for each in fields(EngineConfig)}


def takes_settings(
    *classes: type[BaseSettings],
    only: Collection[str] | None = None,
    without: Collection[str] = (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command an option for each setting.

    Args:
        classes: `ServerConfig` or `EngineSettings`; the options come in the order of their fields.
        only: The settings that the command has; all by default.
        without: Settings that it has not.

    Returns:
        A decorator. The command's parameter `given` gets what was typed by setting; what was not is
        None there.
    """
    names = {
        name: settings
        for settings in classes
        for name in settings.model_fields
        if (only is None or name in only) and name not in without
    }
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=_annotation(settings, name),
        )
        for name, settings in names.items()
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [*(each for each in own if each.name != GIVEN), *options]

        @wraps(command)
        def run(**values: object) -> None:
            given = {name: values.pop(name) for name in names}
            command(**values, **{GIVEN: given})

        # Typer reads the one or the other.
        vars(run)["__signature__"] = inspect.Signature(
            [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
        )
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


def default_of(settings: type[BaseSettings], name: str) -> Any:
    """Returns a setting's default; of `EngineSettings` the one that `EngineConfig` has."""
    default = settings.model_fields[name].default
    if default is None and name in _ENGINE_DEFAULTS:
        default = _ENGINE_DEFAULTS[name]
        return None if default is MISSING else default
    return default


def option(settings: type[BaseSettings], name: str) -> Any:
    """Returns Typer's option for a setting."""
    flag = flag_of(settings, name)
    declaration = flag_name(name)
    # What is off by default is only ever switched on: two names for it crowd the help.
    if default_of(settings, name) is True:
        declaration += f"/--no-{declaration.removeprefix('--')}"
    # Brackets are no markup.
    text = escape(flag.help)
    if said := flag.default or _said(default_of(settings, name)):
        text += f" Default: {said}."
    return typer.Option(
        declaration,
        help=text,
        metavar=_METAVARS.get(_type(settings, name)),
        rich_help_panel=flag.panel,
    )


def _annotation(settings: type[BaseSettings], name: str) -> Any:
    return Annotated[_type(settings, name) | None, option(settings, name)]


def _type(settings: type[BaseSettings], name: str) -> Any:
    return flag_of(settings, name).kind or _kind(settings.model_fields[name].annotation)


def _kind(annotation: Any) -> Any:
    """A field's type as the command line has it: no None, no secrets, and lists for tuples."""
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if get_origin(annotation) in {Union, types.UnionType}:
        (inner,) = (each for each in get_args(annotation) if each is not types.NoneType)
        return _kind(inner)
    if get_origin(annotation) is tuple:
        return list[str]
    return str if annotation is SecretStr else annotation


def _said(default: object) -> str:
    if default is None or default == () or isinstance(default, bool):
        return "on" if default is True else ""
    if default == UNBOUNDED:
        return "full"
    return f"{default:g}" if isinstance(default, float) else str(default)


def setting_value(text: str) -> "JsonValue":
    """Reads the value of a method's setting: JSON, or else the text itself."""
    try:
        value: JsonValue = json.loads(text)
    except ValueError:
        return text
    return value


Revision = Annotated[str | None, option(EngineSettings, "revision")]
TrustRemoteCode = Annotated[bool | None, option(EngineSettings, "trust_remote_code")]
Sparsity = Annotated[float | None, option(EngineSettings, "sparsity")]
Threshold = Annotated[float | None, option(EngineSettings, "threshold")]
SinkSize = Annotated[int | None, option(EngineSettings, "sink_size")]
WindowSize = Annotated[int | None, option(EngineSettings, "window_size")]
