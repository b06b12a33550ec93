"""Traces requests, and sends the traces to an OpenTelemetry collector, off the way of requests.

Spans wait in a bounded queue and go out in batches, on a thread; what does not fit is dropped.
OpenTelemetry's own variables still hold: ``OTEL_SERVICE_NAME``, ``OTEL_EXPORTER_OTLP_HEADERS``,
``OTEL_TRACES_SAMPLER``, ``OTEL_BSP_MAX_QUEUE_SIZE`` and so on.
"""

import asyncio
import logging
import threading
import time
from contextlib import suppress
from importlib.metadata import version

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import (
    SERVICE_NAME,
    SERVICE_VERSION,
    OTELResourceDetector,
    Resource,
)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from starlette.types import ASGIApp

from headlong.server.errors import ConfigError
from headlong.server.telemetry.observer import Observer
from headlong.server.telemetry.trace_spans import TraceMiddleware, TraceObserver

FLUSH_TIMEOUT_S = 5.0
"""What a collector gets at shutdown to take the last spans."""
LOG_EVERY_S = 60.0
"""At most this often a line says that the collector does not answer."""


class Seldom(logging.Filter):
    """Lets one record through every `LOG_EVERY_S` seconds."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """Keeps a record if the last one that was kept is long ago."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + LOG_EVERY_S
        return True


# The exporter logs every attempt to reach a collector that is down.
logging.getLogger(OTLPSpanExporter.__module__).addFilter(Seldom())


class RequestTraces:
    """What an application needs to trace its requests.

    Args:
        endpoint: URL that takes OTLP over HTTP.

    Attributes:
        observer: Learns from the engine what the spans are to tell.

    Raises:
        ConfigError: A variable of OpenTelemetry has a value that it does not take.
    """

    def __init__(self, endpoint: str) -> None:
        self.observer: Observer = TraceObserver()
        release = version("headlong")
        try:
            own = Resource.create({SERVICE_NAME: "headlong", SERVICE_VERSION: release})
            # The operator's variables win over that.
            resource = own.merge(OTELResourceDetector().detect())
            # What interpreters run at their end would wait for a collector that is down.
            self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
            self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        except ValueError as error:
            raise ConfigError(
                f"OpenTelemetry cannot start: {error}", "otlp_traces_endpoint"
            ) from error
        self._tracer = self._provider.get_tracer("headlong", release)

    def wrap(self, app: ASGIApp) -> ASGIApp:
        """Returns a middleware that makes the spans, around an application."""
        return TraceMiddleware(app, self._tracer)

    async def close(self) -> None:
        """Sends what is left, for `FLUSH_TIMEOUT_S` seconds at most."""
        loop, sent = asyncio.get_running_loop(), asyncio.Event()

        def flush() -> None:
            self._provider.shutdown()
            # A loop that did not wait is closed by now.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(sent.set)

        # No thread of an executor: the process would wait for it at its end.
        threading.Thread(target=flush, name="headlong-traces", daemon=True).start()
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_TIMEOUT_S):
                await sent.wait()
