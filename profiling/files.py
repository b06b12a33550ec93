"""Small text files, read with clear errors and written whole or not at all."""

import json
import os
import uuid
from pathlib import Path

from pydantic import JsonValue

from headlong.profiling.errors import ProfileFileError


def read_text(path: Path) -> str:
    """Reads a UTF-8 file.

    Raises:
        ProfileFileError: If it is missing, a folder, unreadable or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ProfileFileError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise ProfileFileError(f"{path}: is a folder, not a file") from error
    except UnicodeDecodeError as error:
        raise ProfileFileError(f"{path}: is not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise ProfileFileError(f"{path}: cannot be read: {error.strerror}") from error


def read_json_object(path: Path) -> dict[str, JsonValue]:
    """Reads a file that holds one JSON object.

    Raises:
        ProfileFileError: If the file cannot be read, is not JSON, holds NaN or an infinity, says
            the same key twice, or is not an object.
    """
    text = read_text(path)
    try:
        value = json.loads(
            text, parse_constant=_refuse_constant, object_pairs_hook=_object_of_distinct_keys
        )
    except RecursionError as error:
        raise ProfileFileError(f"{path}: is not JSON that can be read: nested too deep") from error
    except json.JSONDecodeError as error:
        raise ProfileFileError(f"{path}: is not JSON: {error}") from error
    except ValueError as error:
        raise ProfileFileError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ProfileFileError(f"{path}: holds a {type(value).__name__}, not a JSON object")
    return value


def _refuse_constant(name: str) -> JsonValue:
    raise ValueError(f"holds {name}, which is not a finite number")


def _object_of_distinct_keys(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in values if keys.count(key) > 1)
        raise ValueError(f"says the key {repeated!r} twice")
    return values


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces a file atomically: a reader sees the old contents or the new, never a part.

    Raises:
        ProfileFileError: If the folder is missing or cannot be written.
    """
    # Beside the target, because a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ProfileFileError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
