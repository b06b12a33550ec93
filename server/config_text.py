"""Writes the settings that are in force as a configuration file."""

from pathlib import Path

import yaml

from headlong.server.config import ServerConfig
from headlong.server.config_sources import DEFAULT, Sources
from headlong.server.engine.engine_config import UNBOUNDED, EngineConfig
from headlong.server.engine_settings import EngineSettings
from headlong.server.flag import flag_of

_HEADER = "# Settings of headlong serve, for --config. After each: where it comes from.\n"


def config_text(
    sources: Sources,
    server_config: ServerConfig,
    settings: EngineSettings,
    engine_config: EngineConfig,
) -> str:
    """Writes all settings, so that a server started with them alone does the same.

    Secrets stay out: they are comments that say where they come from.

    Args:
        sources: Where each setting was given.
        server_config: In force.
        settings: What was given of the engine's.
        engine_config: In force.

    Returns:
        YAML.
    """
    lines: list[str] = [_HEADER]
    panel = ""
    for config in (server_config, settings):
        for name in type(config).model_fields:
            flag = flag_of(type(config), name)
            if flag.panel != panel:
                panel = flag.panel
                lines.append(f"\n# {panel}\n")
            value, origin = getattr(config, name), sources.origin(name)
            if value is None and hasattr(engine_config, name):
                value = getattr(engine_config, name)
                if name == "profile" and value is not None:
                    origin = "beside the model"
            if value is None and flag.default:
                origin = f"{DEFAULT}: {flag.default}"
            if not flag.secret:
                # A guard that is set to nothing is refused, in this file too.
                off = "# " if flag.guards and value is None else ""
                lines.append(off + _line(name, value, origin))
            elif origin != DEFAULT:
                lines.append(f"# {_key(name)} is set and not shown: {origin}\n")
    return "".join(lines)


def _line(name: str, value: object, origin: str) -> str:
    if name == "kv_policy_max_window_size" and value == UNBOUNDED:
        value = "full"
    if isinstance(value, tuple):
        # A list in one line, and all else without braces.
        shown = f"{_key(name)}: {_dump(list(value), in_line=True)}"
    else:
        plain = str(value) if isinstance(value, Path) else value
        shown = _dump({_key(name): plain}, in_line=False)
    return f"{shown}  # {origin}\n"


def _key(name: str) -> str:
    return name.replace("_", "-")


def _dump(value: object, *, in_line: bool) -> str:
    text: str = yaml.safe_dump(
        value, default_flow_style=in_line, width=float("inf"), allow_unicode=True
    )
    return text.rstrip("\n")
