"""Starts the engine that a server serves."""

from headlong.server.async_engine import AsyncEngine
from headlong.server.config import ServerConfig
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine_process import EngineProcess
from headlong.server.telemetry.logs import log_config


def start_engine(
    engine_config: EngineConfig, server_config: ServerConfig, *, progress_bars: bool = True
) -> AsyncEngine:
    """Starts an engine in a process of its own, and waits until it is ready.

    Args:
        engine_config: What to load and how.
        server_config: How it is served.
        progress_bars: Whether libraries may draw them among logs in text.

    Returns:
        The engine; its process ends with this one.

    Raises:
        ConfigError: The engine cannot start with this configuration.
        HeadlongError: It failed to start for another reason.
    """
    return AsyncEngine(
        EngineProcess(
            engine_config,
            log_config(server_config),
            progress_bars=progress_bars and server_config.log_format == "text",
        ),
        max_num_queued_reqs=server_config.max_num_queued_reqs,
        hang_timeout=server_config.hang_timeout,
    )
