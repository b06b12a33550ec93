"""The HTTP application."""

from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import FastAPI
from prometheus_client.registry import Collector
from starlette.middleware.cors import CORSMiddleware

from headlong.server.api.openapi import DocumentedAPI
from headlong.server.api.prompts import PromptEncoder
from headlong.server.api.routes_chat import chat_router
from headlong.server.api.routes_completions import completions_router
from headlong.server.api.routes_health import health_router
from headlong.server.api.routes_metrics import metrics_router
from headlong.server.api.routes_models import models_router
from headlong.server.api.routes_page import page_router
from headlong.server.api.routes_responses import responses_router
from headlong.server.api.routes_status import status_router
from headlong.server.api.routes_tokenize import tokenize_router
from headlong.server.api.sampling import ModelLimits
from headlong.server.api.serving import Serving
from headlong.server.api.tool_styles import choose_tool_style
from headlong.server.api_keys import ApiKeys, read_api_keys
from headlong.server.auth import AuthMiddleware
from headlong.server.body_limit import BodyLimitMiddleware, default_max_body_bytes
from headlong.server.config import ServerConfig
from headlong.server.http_errors import install_error_handlers
from headlong.server.receive_timeout import ReceiveTimeoutMiddleware
from headlong.server.send_timeout import SendTimeoutMiddleware
from headlong.server.telemetry.joined_observer import JoinedObserver
from headlong.server.telemetry.metrics import Metrics
from headlong.server.telemetry.recent import RecentFigures
from headlong.server.telemetry.request_log import REQUEST_ID_HEADER, RequestLogMiddleware
from headlong.server.telemetry.tracing import start_tracing

if TYPE_CHECKING:
    from headlong.server.async_engine import AsyncEngine
    from headlong.server.telemetry.request_traces import RequestTraces


def create_app(
    engine: "AsyncEngine", config: ServerConfig, collectors: Iterable[Collector] = ()
) -> FastAPI:
    """Makes the application that serves one engine.

    Args:
        engine: Started and shut down with the application.
        config: How it is served.
        collectors: What `/metrics` tells beside what it always does.

    Returns:
        An ASGI application.

    Raises:
        ConfigError: The chat template or the keys cannot be read, the template is no Jinja, or
            requests cannot be traced.
    """
    chat_template = config.read_chat_template()
    keys = read_api_keys(config)
    serving = Serving(
        engine=engine,
        prompts=PromptEncoder(
            engine.tokenizer,
            vocab_size=engine.vocab_size,
            max_model_len=engine.max_model_len,
            chat_template=chat_template,
        ),
        limits=ModelLimits(engine.max_model_len, engine.vocab_size, engine.default_sampling),
        model_names=config.served_model_name,
        request_timeout=config.request_timeout,
        tool_style=choose_tool_style(config.tool_call_parser, engine.tokenizer, chat_template),
    )
    recent = RecentFigures()
    metrics = Metrics(engine, next(iter(config.served_model_name), engine.info.model))
    for collector in collectors:
        metrics.register(collector)
    traces = start_tracing(config)
    observers = [engine.observer, recent, metrics]
    if traces is not None:
        observers.append(traces.observer)
    engine.observer = JoinedObserver(observers)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        await engine.start()
        try:
            yield
        finally:
            await engine.shutdown()
            if traces is not None:
                await traces.close()

    app = DocumentedAPI(
        needs_key=bool(keys),
        title="Headlong",
        version=version("headlong"),
        lifespan=lifespan,
        # Its pages load their scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        # A redirect is built from the Host header, which the client chose.
        redirect_slashes=False,
    )
    max_body_bytes = config.max_body_bytes or default_max_body_bytes(engine.max_model_len)
    _add_middleware(app, config, metrics, keys, max_body_bytes, traces)
    install_error_handlers(app)
    for make_router in (
        completions_router,
        chat_router,
        responses_router,
        models_router,
        tokenize_router,
        health_router,
    ):
        app.include_router(make_router(serving))
    app.include_router(status_router(serving, recent))
    app.include_router(metrics_router(metrics))
    app.include_router(page_router())
    return app


def _add_middleware(
    app: FastAPI,
    config: ServerConfig,
    metrics: Metrics,
    keys: ApiKeys,
    max_body_bytes: int,
    traces: "RequestTraces | None",
) -> None:
    """Wraps the application, from the inside out."""
    app.add_middleware(BodyLimitMiddleware, max_body_bytes=max_body_bytes)
    app.add_middleware(ReceiveTimeoutMiddleware, receive_timeout=config.receive_timeout)
    app.add_middleware(SendTimeoutMiddleware, send_timeout=config.send_timeout)
    if keys:
        app.add_middleware(AuthMiddleware, keys=keys)
    if config.cors_allow_origin:
        # Browsers ask for permission without a key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_allow_origin,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=(REQUEST_ID_HEADER, "Retry-After"),
        )
    if traces is not None:
        app.add_middleware(traces.wrap)
    app.add_middleware(
        RequestLogMiddleware, on_rejected=metrics.count_rejection, log_bodies=config.log_requests
    )
