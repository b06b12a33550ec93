"""Settings of the server, and the environment that they and the engine's are read from.

Each is a flag of the command line, a variable of the environment (``HEADLONG_`` and the flag's name
in capitals) and a key of a configuration file: what its field says here is all there is to say.
"""

import os
import re
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, SettingsConfigDict

from headlong.server.engine.request import MAX_TIMEOUT_S
from headlong.server.errors import ConfigError
from headlong.server.flag import Flag, flag_of

ENV_PREFIX = "HEADLONG_"
CONFIG_VARIABLE = f"{ENV_PREFIX}CONFIG"

DEFAULT_MAX_NUM_QUEUED_REQS = 512
DEFAULT_HANG_TIMEOUT_S = 300.0

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
ToolCallParser = Literal["auto", "hermes", "llama3_json", "none"]

KEY_CHARS = frozenset(string.ascii_letters + string.digits + string.punctuation) - {","}
"""What an API key may hold: visible ASCII, without the comma that separates keys."""

_LISTENING = "Server"
_LIMITS = "Limits"
_SECURITY = "Security"
_LOGGING = "Logging"

_ORIGIN = re.compile(r"https?://[^/?#@\s]+")
_URL = re.compile(
    r"(?P<base>https?://(?:\[[0-9A-Fa-f:.]+\]|[\w.-]+)(?::(?P<port>\d+))?)(?P<path>/[!-~]*)?"
)


def _split(value: object) -> object:
    return tuple(value.split(",")) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
"""Several values: a flag that may be repeated; separated by commas in the environment."""
Secrets = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split)]
Seconds = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class ServerConfig(BaseSettings):
    """How the engine is offered over HTTP; the fields' `Flag` says what each one is.

    Raises:
        ConfigError: Two settings contradict each other, or a URL is none.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid"
    )

    host: Annotated[str, Flag("Address to listen on.", _LISTENING)] = "127.0.0.1"
    port: Annotated[
        int, Field(ge=0, le=65535), Flag("Port to listen on; 0 takes a free one.", _LISTENING)
    ] = 8000
    served_model_name: Annotated[
        Names, Flag("Name of the model in the API; may be repeated.", _LISTENING)
    ] = ()
    chat_template: Annotated[
        Path | None,
        Flag("Jinja file of a chat template.", _LISTENING, default="the model's own"),
    ] = None
    tool_call_parser: Annotated[
        ToolCallParser,
        Flag("How the model writes tool calls; auto asks its chat template.", _LISTENING),
    ] = "auto"
    shutdown_timeout: Annotated[
        int, Field(ge=0), Flag("Seconds that running requests get at shutdown.", _LISTENING)
    ] = 30
    hang_timeout: Annotated[
        Seconds,
        Flag(
            "Seconds without a step, while there are requests, until the engine counts as dead.",
            _LISTENING,
        ),
    ] = DEFAULT_HANG_TIMEOUT_S

    max_num_queued_reqs: Annotated[
        int, Field(ge=1), Flag("Most requests that are tokenized or wait; more get a 429.", _LIMITS)
    ] = DEFAULT_MAX_NUM_QUEUED_REQS
    request_timeout: Annotated[
        Annotated[float, Field(gt=0.0, le=MAX_TIMEOUT_S, allow_inf_nan=False)] | None,
        Flag("Seconds until a request is given up, and the most it may ask for.", _LIMITS),
    ] = None
    send_timeout: Annotated[
        Seconds, Flag("Seconds that a client may take to read what is sent to it.", _LIMITS)
    ] = 60.0
    receive_timeout: Annotated[
        Seconds,
        Flag(
            "Seconds that a client may take for its headers, and for a piece of its body.", _LIMITS
        ),
    ] = 60.0
    max_body_bytes: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Flag(
            "Most bytes of a request's body; by default 4 MiB and 16 bytes for each token of the "
            "model's context.",
            _LIMITS,
        ),
    ] = None
    max_header_bytes: Annotated[
        int, Field(ge=1024), Flag("Most bytes of a request's line and headers.", _LIMITS)
    ] = 65536

    api_key: Annotated[
        Secrets,
        Flag(
            "Key that clients must send; may be repeated. Others see it in the list of processes: "
            "prefer HEADLONG_API_KEY or --api-key-file.",
            _SECURITY,
            secret=True,
            guards=True,
        ),
    ] = ()
    api_key_file: Annotated[
        Path | None,
        Flag(
            "Keys with names: lines NAME:KEY, or a YAML mapping of names to keys.",
            _SECURITY,
            guards=True,
        ),
    ] = None
    cors_allow_origin: Annotated[
        Names,
        Flag("Origin whose pages may call the API, or *; may be repeated.", _SECURITY),
    ] = ()
    ssl_keyfile: Annotated[
        Path | None, Flag("Private key for TLS, in PEM.", _SECURITY, guards=True)
    ] = None
    ssl_certfile: Annotated[
        Path | None,
        Flag("Certificate for TLS, in PEM, with those that it rests on.", _SECURITY, guards=True),
    ] = None
    ssl_keyfile_password: Annotated[
        SecretStr | None, Flag("Password of --ssl-keyfile.", _SECURITY, secret=True, guards=True)
    ] = None
    ssl_ca_certs: Annotated[
        Path | None,
        Flag(
            "Authorities, in PEM; clients must show a certificate of one of them.",
            _SECURITY,
            guards=True,
        ),
    ] = None

    log_format: Annotated[
        LogFormat, Flag("text for people, json for one object a line.", _LOGGING)
    ] = "text"
    log_level: Annotated[LogLevel, Flag("What is logged at least.", _LOGGING)] = "info"
    log_requests: Annotated[
        bool,
        Flag("Log the beginning of every request's body, prompts included.", _LOGGING),
    ] = False

    otlp_traces_endpoint: Annotated[
        str | None,
        Flag(
            "URL of a collector that takes OTLP over HTTP, for a trace of every request; needs "
            "headlong[tracing]. A URL without a path gets /v1/traces.",
            _LOGGING,
        ),
    ] = None

    @field_validator("api_key")
    @classmethod
    def _check_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        values = [key.get_secret_value() for key in keys]
        for number, value in enumerate(values, start=1):
            if (fault := key_fault(value)) is not None:
                raise ValueError(f"key {number} {fault}")
            if value in values[: number - 1]:
                raise ValueError(f"key {number} was given before")
        return keys

    @field_validator("served_model_name")
    @classmethod
    def _check_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not all(map(str.strip, names)):
            raise ValueError("a name is empty")
        return names

    @field_validator("cors_allow_origin")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            # A browser sends exactly this much; anything else would never match.
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError("an origin is http(s)://HOST or http(s)://HOST:PORT, without path")
        return origins

    @field_validator("otlp_traces_endpoint")
    @classmethod
    def _check_endpoint(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = _URL.fullmatch(url)
        if parts is None or not _is_port(parts["port"]):
            # Without the value: whoever writes a password into a URL wants it shown nowhere.
            raise ConfigError(
                "the URL is to be http(s)://HOST or http(s)://HOST:PORT, with or without a path; "
                "keys go into the variable OTEL_EXPORTER_OTLP_HEADERS",
                "otlp_traces_endpoint",
            )
        return url if (parts["path"] or "/") != "/" else f"{parts['base']}/v1/traces"

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        for name in ("ssl_keyfile", "ssl_ca_certs", "ssl_keyfile_password"):
            if getattr(self, name) is not None and self.ssl_certfile is None:
                raise ConfigError(f"{name} needs --ssl-certfile", name)
        return self

    def with_default_name(self, name: str) -> "ServerConfig":
        """Returns these settings with `name` for the model, if they have none."""
        if self.served_model_name:
            return self
        return self.model_copy(update={"served_model_name": (name,)})

    def read_chat_template(self) -> str | None:
        """Reads the chat template's file, if there is one.

        Raises:
            ConfigError: It cannot be read.
        """
        if self.chat_template is None:
            return None
        try:
            return self.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read the chat template {self.chat_template}: {error}", "chat_template"
            ) from error


def _is_port(text: str | None) -> bool:
    return text is None or 0 < int(text[:6]) <= 65535


def key_fault(key: str) -> str | None:
    """Says what is wrong with an API key, if anything is, without the key itself."""
    if not key:
        return "is empty"
    if not KEY_CHARS.issuperset(key):
        return "may only hold visible ASCII characters without commas"
    return None


def read_environment(settings: type[BaseSettings]) -> dict[str, Any]:
    """Reads the variables of some settings; an empty one counts as not set.

    Args:
        settings: `ServerConfig` or `EngineSettings`.

    Returns:
        Values as they stand there, by name of the field.

    Raises:
        ConfigError: The variable of a setting that guards is empty. Whoever sets it wants to lock
            the server, and not to leave it open.
    """
    for name in settings.model_fields:
        variable = ENV_PREFIX + name.upper()
        if flag_of(settings, name).guards and os.environ.get(variable) == "":
            raise ConfigError(f"the variable {variable} is set, but empty", name)
    return EnvSettingsSource(settings)()


def unknown_variables(settings: Iterable[type[BaseSettings]]) -> list[str]:
    """Returns the variables that look like settings and are none, sorted."""
    known = {ENV_PREFIX + name.upper() for each in settings for name in each.model_fields}
    known.add(CONFIG_VARIABLE)
    return sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name not in known)


def config_path(given: Path | None) -> Path | None:
    """Returns the configuration file that was given, or else the environment's."""
    variable = os.environ.get(CONFIG_VARIABLE)
    return given or (Path(variable) if variable else None)
