"""Settings of the commands that serve a model."""

from pathlib import Path

from headlong.demo.paths import MODEL_DIR
from headlong.server.config import ServerConfig
from headlong.server.config_sources import Sources
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine_settings import EngineSettings

DEMO_MODEL_NAME = "headlong-demo"


def read_serving_settings(sources: Sources) -> tuple[ServerConfig, EngineSettings, EngineConfig]:
    """Reads how a model is served, the embedded one where none is named.

    Args:
        sources: Where settings were given.

    Returns:
        The server's, which name the model; the engine's as they were given, and what they mean.

    Raises:
        ConfigError: One cannot be used.
    """
    server_config = sources.read(ServerConfig)
    settings = sources.read(EngineSettings)
    engine_config = settings.to_engine_config(default_model=str(MODEL_DIR))
    embedded = Path(engine_config.model).resolve() == MODEL_DIR.resolve()
    name = DEMO_MODEL_NAME if embedded else engine_config.model
    return server_config.with_default_name(name), settings, engine_config
