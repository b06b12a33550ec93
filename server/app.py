"""The HTTP application."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import FastAPI

from headlong.server.body_limit import BodyLimitMiddleware
from headlong.server.config import ServerConfig
from headlong.server.http_errors import install_error_handlers
from headlong.server.prompts import PromptEncoder
from headlong.server.routes_chat import chat_router
from headlong.server.routes_completions import completions_router
from headlong.server.routes_models import models_router
from headlong.server.sampling import ModelLimits
from headlong.server.serving import Serving

if TYPE_CHECKING:
    from headlong.server.async_engine import AsyncEngine


def create_app(engine: "AsyncEngine", config: ServerConfig) -> FastAPI:
    """Makes the application that serves one engine.

    Args:
        engine: Started and shut down with the application.
        config: How it is served.

    Returns:
        An ASGI application.

    Raises:
        ConfigError: The chat template cannot be read.
    """
    serving = Serving(
        engine=engine,
        prompts=PromptEncoder(
            engine.tokenizer,
            vocab_size=engine.vocab_size,
            max_model_len=engine.max_model_len,
            chat_template=config.read_chat_template(),
        ),
        limits=ModelLimits(engine.max_model_len, engine.vocab_size, engine.default_sampling),
        model_names=config.served_model_name,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        await engine.start()
        try:
            yield
        finally:
            await engine.shutdown()

    app = FastAPI(
        title="Headlong",
        version=version("headlong"),
        lifespan=lifespan,
        # Its pages load their scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        # A redirect is built from the Host header, which the client chose.
        redirect_slashes=False,
    )
    app.add_middleware(BodyLimitMiddleware, max_body_bytes=config.max_body_bytes)
    install_error_handlers(app)
    for router in (completions_router(serving), chat_router(serving), models_router(serving)):
        app.include_router(router)
    return app
