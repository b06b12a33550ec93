"""Runs the application on a socket until a signal comes or the engine dies."""

import asyncio
import errno
import math
import socket
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from headlong.server.config import ServerConfig
from headlong.server.draining_server import DrainingServer
from headlong.server.errors import ConfigError
from headlong.server.receive_timeout import timed_protocol
from headlong.server.telemetry.logs import log_config
from headlong.server.tls import tls_options

if TYPE_CHECKING:
    from headlong.server.async_engine import AsyncEngine

FLUSH_TIMEOUT_S = 5


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
    except (OSError, UnicodeError) as error:
        raise _cannot_listen(host, port, error) from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _cannot_listen(host, port, error) from error
    return sock


def listen(app: FastAPI, engine: "AsyncEngine", sock: socket.socket, config: ServerConfig) -> int:
    """Serves until SIGINT, SIGTERM or the engine's death.

    The first signal lets running requests finish, for `config.shutdown_timeout` seconds; the
    second ends everything at once.

    Args:
        app: Starts and shuts down `engine`.
        engine: Watched, and ended in any case.
        sock: Bound.
        config: How it is served.

    Returns:
        The process's exit code: 1 if the engine died or the application did not start.

    Raises:
        ConfigError: Another process took the address in the meantime.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # What the application has sent may still wait for its reader: there the kernel gives up.
        milliseconds = min(math.ceil(config.send_timeout * 1000), 2**31 - 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    uvicorn_config = uvicorn.Config(
        app,
        # It bounds the size of headers, which httptools does not.
        http=timed_protocol(config.receive_timeout),
        ws="none",
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=FLUSH_TIMEOUT_S,
        h11_max_incomplete_event_size=config.max_header_bytes,
        # Each request has a line of its own, with its id.
        access_log=False,
        log_config=log_config(config),
        **tls_options(config),
    )
    server = DrainingServer(uvicorn_config, engine, config.shutdown_timeout)
    host, port = sock.getsockname()[:2]
    try:
        asyncio.run(server.serve(sockets=[sock]))
    except KeyboardInterrupt:
        pass
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    finally:
        engine.kill()
    return 1 if server.engine_died or not server.started else 0


def _cannot_listen(host: str, port: int, error: OSError | UnicodeError) -> ConfigError:
    # A name that is none, and one that is too long or has an empty part.
    is_hosts = isinstance(error, socket.gaierror | UnicodeError)
    if isinstance(error, OSError):
        is_hosts = is_hosts or error.errno == errno.EADDRNOTAVAIL
        reason = error.strerror or str(error)
    else:
        reason = "not a name of a host"
    message = f"cannot listen on {host}:{port}: {reason}"
    return ConfigError(message, "host" if is_hosts else "port")
