"""Runs the application on a socket until a signal comes or the engine dies."""

import asyncio
import copy
import socket
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI
from uvicorn.config import LOGGING_CONFIG

from headlong.server.errors import ConfigError

if TYPE_CHECKING:
    from headlong.server.async_engine import AsyncEngine


def bind(host: str, port: int) -> socket.socket:
    """Takes the address, before anything slow is done for it.

    Args:
        host: Name or address.
        port: 0 takes a free one.

    Returns:
        A socket that does not listen yet.

    Raises:
        ConfigError: The address is unknown, in use or not allowed.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _cannot_listen(host, port, error) from error
    return sock


def listen(app: FastAPI, engine: "AsyncEngine", sock: socket.socket, shutdown_timeout: int) -> int:
    """Serves until SIGINT, SIGTERM or the engine's death.

    Args:
        app: Starts and shuts down `engine`.
        engine: Watched.
        sock: Bound.
        shutdown_timeout: Seconds that running requests get to finish.

    Returns:
        The process's exit code: 1 if the engine died or the application did not start.

    Raises:
        ConfigError: Another process took the address in the meantime.
    """
    config = uvicorn.Config(
        app,
        # It bounds the size of headers, which httptools does not.
        http="h11",
        ws="none",
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=shutdown_timeout,
        log_config=_log_config(),
    )
    server = uvicorn.Server(config)
    engine_died = False

    async def stop_with_engine() -> None:
        nonlocal engine_died
        await engine.wait_dead()
        engine_died = not server.should_exit
        server.should_exit = True

    async def serve() -> None:
        watcher = asyncio.create_task(stop_with_engine())
        try:
            await server.serve(sockets=[sock])
        finally:
            watcher.cancel()

    host, port = sock.getsockname()[:2]
    try:
        asyncio.run(serve())
    except KeyboardInterrupt:
        pass
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    return 1 if engine_died or not server.started else 0


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}", "port")


def _log_config() -> dict[str, Any]:
    config = copy.deepcopy(LOGGING_CONFIG)
    config["loggers"]["headlong"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    return config
