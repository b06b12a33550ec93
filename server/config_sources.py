"""Where settings come from: the command line, else the environment, else a file, else a default."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic_settings import BaseSettings

from headlong.server.config import ENV_PREFIX, read_environment
from headlong.server.config_file import ConfigFile
from headlong.server.errors import ConfigError
from headlong.server.flag import flag_of

S = TypeVar("S", bound=BaseSettings)

DEFAULT = "default"


def load(settings: type[S], /, **given: object) -> S:
    """Reads settings from arguments and the environment.

    Args:
        settings: `ServerConfig` or `EngineSettings`.
        given: Values from the command line; None leaves the field to the environment.

    Raises:
        ConfigError: A value has the wrong type or is out of range.
    """
    return Sources(given).read(settings)


@dataclass(slots=True)
class Sources:
    """Everything that was given, and by whom.

    Args:
        given: Values from the command line; None and empty lists were not given.
        file: The configuration file, if there is one.
    """

    given: Mapping[str, object]
    file: ConfigFile | None = None
    _origins: dict[str, str] = field(default_factory=dict, init=False)
    _of_file: set[str] = field(default_factory=set, init=False)

    def read(self, settings: type[S]) -> S:
        """Reads the settings of one class.

        Raises:
            ConfigError: A value has the wrong type or is out of range; `param` names its field.
        """
        values: dict[str, Any] = {}
        environment = read_environment(settings)
        for name in settings.model_fields:
            if (value := self.given.get(name)) not in (None, []):
                values[name], self._origins[name] = value, flag_name(name)
            elif name in environment:
                values[name] = environment[name]
                self._origins[name] = ENV_PREFIX + name.upper()
            elif self.file is not None and (entry := self.file.entries.get(name)) is not None:
                if entry.value in (None, []) and not flag_of(settings, name).guards:
                    continue
                self._origins[name] = self.file.place(entry)
                self._of_file.add(name)
                _check_kind(settings, name, entry.value)
                values[name] = entry.value
        try:
            return settings(**values)
        except ValidationError as error:
            # Pydantic's own error holds the values, secrets too, and would be shown as the cause.
            raise _config_error(settings, error) from None

    def origin(self, name: str) -> str:
        """Returns the flag, variable or line that set `name`, or "default"; once it is read."""
        return self._origins.get(name, DEFAULT)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Begins the message of any `ConfigError` with the place where its setting was given.

        Raises:
            ConfigError: In place of one that was raised inside.
        """
        try:
            yield
        except ConfigError as error:
            if error.param is None:
                raise
            raise ConfigError(self._say_where(error.param, error.message), error.param) from error

    def _say_where(self, param: str, message: str) -> str:
        name = param.partition(".")[0]
        origin = self.origin(name)
        if origin == DEFAULT:
            origin = flag_name(name)
        # Its own words begin with the name of the setting, or speak of something else.
        rest = message.removeprefix(param)
        if name in self._of_file:
            origin += f": {name.replace('_', '-')}"
        if rest != message and rest[:1] in {" ", ":"}:
            return origin + rest
        return f"{origin}: {message}"


def flag_name(name: str) -> str:
    """Returns a setting's flag; the model is the one argument without."""
    return "MODEL" if name == "model" else f"--{name.replace('_', '-')}"


def _config_error(settings: type[BaseSettings], error: ValidationError) -> ConfigError:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    which = "".join(f"value {at + 1}: " for at in first["loc"][1:] if isinstance(at, int))
    # What a validator of ours says needs no "Value error" before it, and people write lists.
    own = first.get("ctx", {}).get("error")
    message = f"{name}: {which}{own or first['msg'].replace('valid tuple', 'list')}"
    if not flag_of(settings, name).secret:
        message += f", got {first['input']!r}"
    return ConfigError(message, name)


def _check_kind(settings: type[BaseSettings], name: str, value: object) -> None:
    """Refuses what a file says and cannot mean."""
    if flag_of(settings, name).guards and value in (None, "", [], {}):
        raise ConfigError(f"{name} is set, but empty", name)
    annotation = settings.model_fields[name].annotation
    is_switch = bool in (annotation, *get_args(annotation))
    if is_switch and not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {value!r}", name)
    # YAML reads yes and on as true, which would go for the number 1.
    if isinstance(value, bool) and not is_switch:
        raise ConfigError(f"{name}: got {value}, put the value in quotes if it is text", name)
