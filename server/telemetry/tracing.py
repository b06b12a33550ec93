"""Traces of requests, for whoever asks for them: without the flag OpenTelemetry is not imported."""

# ruff: noqa: PLC0415

from importlib.util import find_spec
from typing import TYPE_CHECKING

from headlong.server.config import ServerConfig
from headlong.server.errors import ConfigError

if TYPE_CHECKING:
    from headlong.server.telemetry.request_traces import RequestTraces

_NEEDED = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")


def check_tracing(config: ServerConfig) -> None:
    """Checks that traces can be made, if they are asked for.

    Raises:
        ConfigError: The packages are not there.
    """
    if config.otlp_traces_endpoint is not None and not all(map(_is_there, _NEEDED)):
        raise ConfigError(
            "otlp_traces_endpoint needs OpenTelemetry: pip install 'headlong[tracing]'",
            "otlp_traces_endpoint",
        )


def start_tracing(config: ServerConfig) -> "RequestTraces | None":
    """Begins to trace requests.

    Returns:
        What traces them; None without an endpoint.

    Raises:
        ConfigError: The packages are not there, or their own variables are wrong.
    """
    if config.otlp_traces_endpoint is None:
        return None
    check_tracing(config)
    from headlong.server.telemetry.request_traces import RequestTraces

    return RequestTraces(config.otlp_traces_endpoint)


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
