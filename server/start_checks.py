"""What an operator should hear before the slow part of a start."""

import ipaddress
import logging
import stat
from collections.abc import Iterable
from pathlib import Path

from pydantic_settings import BaseSettings

from headlong.server.api_keys import read_api_keys
from headlong.server.config import ServerConfig, unknown_variables
from headlong.server.engine_settings import EngineSettings
from headlong.server.telemetry.tracing import check_tracing
from headlong.server.tls import check_tls

logger = logging.getLogger(__name__)


def check_start(
    config: ServerConfig,
    settings: Iterable[type[BaseSettings]] = (ServerConfig, EngineSettings),
) -> None:
    """Reads what the server will need, and warns of what is probably not meant.

    Args:
        config: How the engine is offered.
        settings: All that the command reads from the environment.

    Raises:
        ConfigError: A file cannot be used.
    """
    keys = read_api_keys(config)
    check_tls(config)
    check_tracing(config)
    config.read_chat_template()
    for name in unknown_variables(settings):
        logger.warning("the variable %s is no setting, and has no effect", name)
    if not keys and not _is_loopback(config.host):
        logger.warning(
            "listening on %s without an API key: whoever reaches the port can use the model and "
            "read its metrics (--api-key-file, or HEADLONG_API_KEY)",
            config.host,
        )
    if keys and config.ssl_certfile is None and not _is_loopback(config.host):
        logger.warning("API keys travel in clear without TLS (--ssl-certfile, or a proxy with it)")
    for path in (config.api_key_file, config.ssl_keyfile):
        if path is not None and _others_may_read(path):
            logger.warning("%s holds secrets and every user of this machine may read it", path)
    if config.log_requests:
        logger.warning("prompts are logged (--log-requests)")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _others_may_read(path: Path) -> bool:
    return bool(path.stat().st_mode & stat.S_IROTH)
