"""Starts Ray or joins it, runs the application there, and ends it after a signal."""

import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from headlong.server.config import ServerConfig
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.tokenizer import load_tokenizer
from headlong.server.errors import ConfigError, HeadlongError
from headlong.server.fleet.settings import RaySettings
from headlong.server.listen import bind
from headlong.server.ray_app import QUIET, check_device, make_app, num_gpus

logger = logging.getLogger(__name__)

APP_NAME = "headlong"
OBJECT_STORE_BYTES = 128 << 20
"""Of a Ray that is started here: requests and tokens are too small to go there."""

WATCH_S = 1.0
DRAIN_POLL_S = 0.2
CALL_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 5.0
MAX_SILENT_WATCHES = 10
SIGNAL_EXIT_CODE = 128

_CONFIG_ERROR = re.compile(r"\bConfigError: (.+)")
_ANY_ERROR = re.compile(r"[\w.]*(Error|Exception)\b")


def serve_on_ray(
    engine_config: EngineConfig,
    config: ServerConfig,
    settings: RaySettings,
    address: str | None,
    say: Callable[[str], None],
) -> int:
    """Serves until SIGINT or SIGTERM.

    The first signal lets running requests finish, for `config.shutdown_timeout` seconds; the second
    ends everything at once.

    Args:
        engine_config: Of each engine.
        config: How they are offered.
        settings: How many there are.
        address: Of a Ray cluster to join; None starts one on this machine, for as long as this
            lasts.
        say: Takes lines for the operator.

    Returns:
        The process's exit code: 1 if Ray was lost.

    Raises:
        ConfigError: The address is in use, there is no such cluster, it is too small, or the
            engines cannot start with these settings.
        HeadlongError: They failed to start for another reason.
    """
    check_device(engine_config)
    with closing(bind(config.host, config.port)) as sock:
        host, port = sock.getsockname()[:2]
    if address is None:
        # Replicas try to start several times, and each time with pages of text.
        load_tokenizer(engine_config)
    with _ray(address):
        if address is None:
            _check_room(engine_config, settings)
        else:
            _check_no_serve(address)
        stop = _Signals()
        # Ray has handlers of its own, which print pages.
        stop.install()
        try:
            _start_proxies(config, host, port)
            ingress = _run(engine_config, config, settings)
            stop.started = True
            for line in _call(ingress, "describe"):
                say(line)
            say(f"Serving {', '.join(config.served_model_name)}")
            scheme = "http" if config.ssl_certfile is None else "https"
            shown = f"[{host}]" if ":" in host else host
            logger.info("Listening on %s://%s:%d", scheme, shown, port)
            if not _wait(stop):
                logger.critical("Ray is lost")
                return 1
            logger.info("Finishing requests for up to %s s", config.shutdown_timeout)
            _drain(ingress, config.shutdown_timeout, stop)
        finally:
            _end_application()
    return 0


def start_error(messages: Iterable[str]) -> HeadlongError:
    """Finds what a replica raised in what Ray tells of it, a traceback of tracebacks.

    Args:
        messages: Ray's, one or more.

    Returns:
        The error to end with.
    """
    text = "\n".join(messages)
    if found := _CONFIG_ERROR.findall(text):
        return ConfigError(found[-1])
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if _ANY_ERROR.match(line)), lines[-1])
    return HeadlongError(f"the replicas did not start: {reason}")


class _Signals:
    """Notes the first and the second signal that ask for an end.

    Attributes:
        started: Until this is set, a signal ends the start.
        first: Set by a signal after that.
        second: Set by one after that.
    """

    def __init__(self) -> None:
        self.started = False
        self.first = threading.Event()
        self.second = threading.Event()

    def install(self) -> None:
        """Take the signals from now on."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._take)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if not self.started:
            raise SystemExit(SIGNAL_EXIT_CODE + number)
        (self.second if self.first.is_set() else self.first).set()


@contextmanager
def _ray(address: str | None) -> Iterator[None]:
    # Ray reports home by default.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local = address is None
    if address is not None:
        _check_reachable(address)
    try:
        ray.init(
            # A variable of the environment may name a cluster, and nobody asked for it.
            address="local" if local else address,
            namespace=APP_NAME,
            include_dashboard=False if local else None,
            object_store_memory=OBJECT_STORE_BYTES if local else None,
        )
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        if local:
            raise HeadlongError(f"Ray did not start: {error}") from error
        raise ConfigError(f"cannot reach Ray at {address}: {error}", "address") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Refuses HOST:PORT where nobody answers: Ray would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()) or "/" in host:
        raise ConfigError(f"address must be auto or HOST:PORT, got {address!r}", "address")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot reach Ray at {address}: {error}", "address") from error


def _check_no_serve(address: str) -> None:
    """Refuses a cluster whose proxies are somebody else's: they listen where he told them to."""
    if serve.status().proxies:
        raise ConfigError(
            f"Ray Serve runs at {address} already: use serve run, or end it with serve shutdown",
            "address",
        )


def _check_room(engine_config: EngineConfig, settings: RaySettings) -> None:
    """Refuses more replicas than this machine has room for: Ray would wait for others for ever."""
    count = settings.fewest_replicas
    there = ray.cluster_resources()
    for kind, each, name in (
        ("CPU", settings.num_cpus_per_replica, "num_cpus_per_replica"),
        ("GPU", num_gpus(engine_config, settings), "num_gpus_per_replica"),
    ):
        if count * each > there.get(kind, 0.0):
            raise ConfigError(
                f"{count} times {each:g} {kind}s do not fit this machine, which has "
                f"{there.get(kind, 0.0):g}",
                name,
            )


def _start_proxies(config: ServerConfig, host: str, port: int) -> None:
    password = config.ssl_keyfile_password
    serve.start(
        http_options={
            "host": host,
            "port": port,
            "ssl_keyfile": _text(config.ssl_keyfile or config.ssl_certfile),
            "ssl_certfile": _text(config.ssl_certfile),
            "ssl_keyfile_password": None if password is None else password.get_secret_value(),
            "ssl_ca_certs": _text(config.ssl_ca_certs),
        },
        logging_config=dict(QUIET),
    )


def _text(path: object) -> str | None:
    return None if path is None else str(path)


def _run(
    engine_config: EngineConfig, config: ServerConfig, settings: RaySettings
) -> DeploymentHandle[Any]:
    application = make_app(engine_config, config, settings)
    try:
        return serve.run(application, name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        deployments = serve.status().applications[APP_NAME].deployments.values()
        raise start_error([each.message for each in deployments] or [str(error)]) from error


def _end_application() -> None:
    try:
        serve.delete(APP_NAME)
        # In a cluster that was joined, others may have come to use what was started here.
        if not serve.status().applications:
            serve.shutdown()
    except (RayError, RayServeException, RuntimeError) as error:
        logger.warning("the application could not be ended: %s", error)


def _wait(stop: _Signals) -> bool:
    """Returns when a signal comes, or False when Ray is lost."""
    num_silent = 0
    while not stop.first.wait(WATCH_S):
        try:
            serve.status()
            num_silent = 0
        except (RayError, RayServeException, RuntimeError):
            num_silent += 1
            if num_silent > MAX_SILENT_WATCHES:
                return False
    return True


def _drain(ingress: DeploymentHandle[Any], timeout_s: float, stop: _Signals) -> None:
    deadline = time.monotonic() + timeout_s
    try:
        _call(ingress, "drain")
        while time.monotonic() < deadline and not all(_all(ingress, "is_idle")):
            if stop.second.wait(DRAIN_POLL_S):
                logger.info("Ending at once")
                return
    except (RayError, RayServeException, TimeoutError) as error:
        logger.warning("the ingress could not be drained: %s", error)


def _call(ingress: DeploymentHandle[Any], method: str) -> Any:
    """What one ingress answers; all of them are asked."""
    return next(iter(_all(ingress, method)))


def _all(ingress: DeploymentHandle[Any], method: str) -> list[Any]:
    return list(ingress.broadcast(method).results(timeout_s=CALL_TIMEOUT_S))
