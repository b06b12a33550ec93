"""When requests are traced, and what is needed for it."""

import logging
import re
import subprocess
import sys

import pytest

from headlong.server.config import ServerConfig
from headlong.server.errors import ConfigError
from headlong.server.start_checks import check_start
from headlong.server.telemetry import request_traces, tracing


def test_a_collector_that_is_down_fills_no_log() -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    log = logging.getLogger("headlong.test.seldom")
    log.addFilter(request_traces.Seldom())
    log.addHandler(handler)
    for number in range(5):
        log.warning("attempt %d", number)
    assert [each.getMessage() for each in records] == ["attempt 0"]


def test_without_the_flag_nothing_of_it_is_imported() -> None:
    script = (
        "import sys\n"
        "from headlong.server.app import create_app\n"
        "from headlong.server.config import ServerConfig\n"
        "from headlong.server.telemetry.tracing import start_tracing\n"
        "assert start_tracing(ServerConfig()) is None\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry.sdk')]\n"
        "assert 'headlong.server.telemetry.request_traces' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-P", "-c", script], check=True, timeout=120)


def test_without_its_packages_the_server_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "find_spec", lambda _: None)
    check_start(ServerConfig())
    with pytest.raises(ConfigError, match=re.escape("pip install 'headlong[tracing]'")) as caught:
        check_start(ServerConfig(otlp_traces_endpoint="http://localhost:4318"))
    assert caught.value.param == "otlp_traces_endpoint"


def test_a_wrong_variable_of_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "1")
    with pytest.raises(ConfigError, match="OpenTelemetry cannot start"):
        request_traces.RequestTraces("http://localhost:4318/v1/traces")


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://localhost:4318", "http://localhost:4318/v1/traces"),
        ("https://collector.example/", "https://collector.example/v1/traces"),
        ("http://[::1]:4318", "http://[::1]:4318/v1/traces"),
        ("http://host/otlp?x=1", "http://host/otlp?x=1"),
    ],
)
def test_endpoints(given: str, used: str) -> None:
    assert ServerConfig(otlp_traces_endpoint=given).otlp_traces_endpoint == used


@pytest.mark.parametrize(
    "given",
    ["", "localhost:4318", "grpc://host", "http://", "http://a:b@host", "http://host:0",
     "http://host:70000", "http://host:1" + "0" * 5000, "http://host/a b", "http://ho st"],
)  # fmt: skip
def test_endpoints_that_are_none(given: str) -> None:
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_HEADERS") as caught:
        ServerConfig(otlp_traces_endpoint=given)
    assert caught.value.param == "otlp_traces_endpoint"
    assert "a:b" not in caught.value.message
