"""Reads a configuration file: YAML whose keys are the names of flags."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from headlong.server.errors import ConfigError

_NULL = "tag:yaml.org,2002:null"


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of the file.

    Attributes:
        value: As YAML reads it; None of a key without a value.
        line: Where the key stands, from 1.
    """

    value: Any
    line: int


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """What a configuration file sets.

    Attributes:
        path: The file.
        entries: By name of the setting.
    """

    path: Path
    entries: dict[str, Entry]

    def place(self, entry: Entry) -> str:
        """Returns file and line of an entry, for people."""
        return f"{self.path}:{entry.line}"


def read_config_file(path: Path, known: Collection[str]) -> ConfigFile:
    """Reads a configuration file.

    Args:
        path: A YAML mapping. A key is the name of a setting, with - or _.
        known: Names of all settings.

    Raises:
        ConfigError: It cannot be read, is no mapping, or has a key that is not known or comes
            twice; the message names the file and the line.
    """
    entries: dict[str, Entry] = {}
    for key, entry in read_mapping(path):
        place = f"{path}:{entry.line}"
        name = str(key).replace("-", "_")
        if not isinstance(key, str) or name not in known:
            raise ConfigError(f"{place}: {str(key)[:100]!r} is no setting")
        if name in entries:
            raise ConfigError(f"{place}: {key!r} was set before, in line {entries[name].line}")
        entries[name] = entry
    return ConfigFile(path, entries)


def read_mapping(path: Path) -> list[tuple[object, Entry]]:
    """Reads a YAML mapping.

    Returns:
        Its keys and values in order, with keys that come twice.

    Raises:
        ConfigError: It cannot be read, or is no mapping; the message names the file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{path}: cannot be read: {reason}") from error
    try:
        return _pairs(path, text)
    # A date of no calendar and a tag that does not fit are found when values are made.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {_short(error)}") from error


def _pairs(path: Path, text: str) -> list[tuple[object, Entry]]:
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None or root.tag == _NULL:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}: must be a mapping of settings to values")
        return [
            (
                loader.construct_object(key, deep=True),
                Entry(loader.construct_object(value, deep=True), key.start_mark.line + 1),
            )
            for key, value in root.value
        ]
    finally:
        loader.dispose()


def _short(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} in line {error.problem_mark.line + 1}"
    return " ".join(str(error).split())[:200]
