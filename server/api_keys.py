"""API keys: who may ask, and in whose name."""

import hashlib
import hmac
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from headlong.server.config import ServerConfig, key_fault
from headlong.server.config_file import read_mapping
from headlong.server.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PARAM = "api_key_file"


class ApiKeys:
    """Knows keys again without keeping them.

    Args:
        keys: By name.
    """

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._digests = {name: _digest(key.encode()) for name, key in keys.items()}

    def __len__(self) -> int:
        return len(self._digests)

    def name_of(self, key: bytes) -> str | None:
        """Returns the name of a key, or None if it is not known.

        The time it takes tells nothing of the keys: digests are compared, each in constant time,
        and always all of them.
        """
        digest = _digest(key)
        found: str | None = None
        for name, known in self._digests.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found


def read_api_keys(config: ServerConfig) -> ApiKeys:
    """Collects the keys: those given directly are named key-1, key-2 and so on.

    Raises:
        ConfigError: The file cannot be read, or a key is malformed or comes twice. The message
            never holds a key.
    """
    keys = {f"key-{number}": key.get_secret_value() for number, key in enumerate(config.api_key, 1)}
    if config.api_key_file is None:
        return ApiKeys(keys)
    num_before = len(keys)
    for line, name, key in _entries(config.api_key_file):
        place = f"{config.api_key_file}:{line}"
        if not _NAME.fullmatch(name):
            want = "1 to 64 letters, digits, dots, dashes or underscores"
            raise ConfigError(f"{place}: the name of a key must be {want}", _PARAM)
        if name in keys:
            raise ConfigError(f"{place}: the name {name!r} was given before", _PARAM)
        if (fault := key_fault(key)) is not None:
            raise ConfigError(f"{place}: the key of {name!r} {fault}", _PARAM)
        if key in keys.values():
            raise ConfigError(f"{place}: the key of {name!r} was given before", _PARAM)
        keys[name] = key
    if len(keys) == num_before:
        # Whoever names a file wants to lock the server, and not to leave it open.
        raise ConfigError(f"{config.api_key_file}: holds no key", _PARAM)
    return ApiKeys(keys)


def _entries(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line, name and key of each entry."""
    if path.suffix in {".yaml", ".yml"}:
        for name, entry in read_mapping(path):
            if not isinstance(name, str) or not isinstance(entry.value, str):
                fault = "names and keys must be text, put them in quotes"
                raise ConfigError(f"{path}:{entry.line}: {fault}", _PARAM)
            yield entry.line, name, entry.value
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{path}: cannot be read: {reason}", _PARAM) from error
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            name, colon, key = text.partition(":")
            if not colon:
                raise ConfigError(f"{path}:{number}: must be NAME:KEY", _PARAM)
            yield number, name.strip(), key.strip()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
