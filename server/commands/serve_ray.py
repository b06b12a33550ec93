"""``headlong serve-ray``."""

# ruff: noqa: PLC0415

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from headlong.server.commands.options import takes_settings
from headlong.server.commands.serving_settings import read_serving_settings
from headlong.server.config import ServerConfig, config_path
from headlong.server.config_file import read_config_file
from headlong.server.config_sources import DEFAULT, Sources
from headlong.server.engine_settings import EngineSettings
from headlong.server.errors import ConfigError
from headlong.server.fleet.settings import WITHOUT_EFFECT, RaySettings

logger = logging.getLogger(__name__)

_SETTINGS = tuple(
    name
    for settings in (RaySettings, ServerConfig, EngineSettings)
    for name in settings.model_fields
    if name not in WITHOUT_EFFECT
)


@takes_settings(RaySettings, ServerConfig, EngineSettings, without={"model", *WITHOUT_EFFECT})
def serve_ray(
    given: dict[str, object],
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub id; the embedded demo model by default.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster to run in: auto, or HOST:PORT. By default one is started on this "
            "machine."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings; its keys are the flags' names.")
    ] = None,
) -> None:
    """Serve a model by many engines, on the machines of a Ray cluster."""
    if find_spec("ray") is None or find_spec("ray.serve") is None:
        raise ConfigError("serve-ray needs Ray Serve: pip install 'headlong[ray]'")
    path = config_path(config)
    file = read_config_file(path, _SETTINGS) if path is not None else None
    sources = Sources({**given, "model": model}, file)
    with sources.named():
        settings = sources.read(RaySettings)
        server_config, _, engine_config = read_serving_settings(sources)

        from headlong.server.start_checks import check_start
        from headlong.server.telemetry.logs import configure_logs

        say = configure_logs(server_config)
        check_start(server_config, (ServerConfig, EngineSettings, RaySettings))
        for name in WITHOUT_EFFECT:
            if sources.origin(name) != DEFAULT:
                logger.warning("%s has no effect behind Ray's proxy", sources.origin(name))

        from headlong.server.commands.ray_cluster import serve_on_ray

        code = serve_on_ray(engine_config, server_config, settings, address, say)
    raise typer.Exit(code)
