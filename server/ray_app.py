"""The application that Ray Serve runs: an OpenAI ingress, and replicas of the engine behind it.

``serve run headlong.server.ray_app:build_app model=… num_replicas=2`` runs it, and so does KubeRay
with that import path. `serve-ray` does the same without a file.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headlong.server.app import create_app
from headlong.server.async_engine import AsyncEngine
from headlong.server.config import ServerConfig
from headlong.server.config_sources import Sources
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.messages import Ready
from headlong.server.engine.tokenizer import load_tokenizer
from headlong.server.engine_settings import EngineSettings
from headlong.server.errors import ConfigError, EngineDeadError
from headlong.server.fleet.link import RayLink
from headlong.server.fleet.messages import decode_told
from headlong.server.fleet.metrics import ReplicaCollector
from headlong.server.fleet.replica import EngineReplica
from headlong.server.fleet.router import EngineRouter, RouterSettings
from headlong.server.fleet.settings import PROXY_SETTINGS, RaySettings
from headlong.server.telemetry.logs import configure_logs
from headlong.server.telemetry.request_log import REQUEST_ID_HEADER

ENGINE_DEPLOYMENT = "engine"
INGRESS_DEPLOYMENT = "ingress"

UNBOUNDED_REQUESTS = 1_000_000
"""What an ingress takes; its queue gate turns away what is too much, in OpenAI's form."""
QUIET: Mapping[str, Any] = {"log_level": "WARNING", "enable_access_log": False}
"""How Ray logs: requests have lines of ours."""
SHUTDOWN_MARGIN_S = 10.0
DRAIN_POLL_S = 0.5


class OneRequestIdMiddleware:
    """Leaves the request's id out of the response, to which Ray's proxy adds it too.

    Args:
        app: What it wraps.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""

        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)[REQUEST_ID_HEADER]
            await send(message)

        await self._app(scope, receive, send_without)


class Ingress:
    """Serves HTTP for the engines of all replicas.

    Args:
        engines: The deployment of `EngineReplica`.
        engine_config: Whose tokenizer it loads.
        config: How the engines are offered.
    """

    # Ray awaits it.
    async def __init__(  # type: ignore[misc]
        self, engines: DeploymentHandle[Any], engine_config: EngineConfig, config: ServerConfig
    ) -> None:
        configure_logs(config)
        ready = decode_told(await engines.info.remote()).event
        assert isinstance(ready, Ready)
        tokenizer = await asyncio.to_thread(load_tokenizer, engine_config)
        self._config = config
        self._link = RayLink(engines, ready.info, tokenizer)
        self._engine = AsyncEngine(
            self._link,
            max_num_queued_reqs=config.max_num_queued_reqs,
            hang_timeout=config.hang_timeout,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Makes the application; Ray calls this once, in the event loop of all requests."""
        model = next(iter(self._config.served_model_name))
        app = create_app(self._engine, self._config, [ReplicaCollector(self._link, model)])
        app.add_middleware(OneRequestIdMiddleware)
        return app

    async def describe(self) -> list[str]:
        """Lines for the operator about one engine."""
        return list(self._link.one.lines)

    async def drain(self) -> None:
        """Takes no new requests, and finishes those that there are."""
        self._engine.drain()

    async def is_idle(self) -> bool:
        """Whether there is no request left."""
        return self._engine.is_idle

    async def check_health(self) -> None:
        """Fails when this ingress cannot serve any more, for Ray to replace it.

        Raises:
            EngineDeadError: It has given its engines up.
        """
        if self._engine.state == "dead":
            raise EngineDeadError("the ingress is not running")


def build_app(args: Mapping[str, Any]) -> Application:
    """Makes the application of settings.

    Args:
        args: Settings by name, those of ``headlong serve`` and of `RaySettings`; the environment's
            count too. Host, port and TLS are those of Serve's proxy, in its own configuration.

    Raises:
        ConfigError: A setting is unknown or out of range, or is the proxy's.
    """
    given = {name.replace("-", "_"): value for name, value in args.items()}
    known = [*RaySettings.model_fields, *ServerConfig.model_fields, *EngineSettings.model_fields]
    for name in given:
        if name in PROXY_SETTINGS:
            raise _proxys(name)
        if name not in known:
            raise ConfigError(f"{name} is no setting", name)
    sources = Sources(given)
    with sources.named():
        config = sources.read(ServerConfig)
        if config.ssl_certfile is not None:
            raise _proxys("ssl_certfile")
        settings = sources.read(EngineSettings)
        if settings.model is None:
            raise ConfigError("model is needed: a folder or hub id", "model")
        engine_config = settings.to_engine_config(default_model=settings.model)
        config = config.with_default_name(engine_config.model)
        return make_app(engine_config, config, sources.read(RaySettings))


def make_app(
    engine_config: EngineConfig, config: ServerConfig, settings: RaySettings
) -> Application:
    """Makes the application; Ray must have been started, or it starts now.

    Args:
        engine_config: Of each engine.
        config: How they are offered; it has a name for the model.
        settings: How many there are and who gets which request.

    Raises:
        ConfigError: The device cannot be one of several replicas.
    """
    check_device(engine_config)
    shutdown_s = config.shutdown_timeout + SHUTDOWN_MARGIN_S
    engines = serve.deployment(
        name=ENGINE_DEPLOYMENT,
        # The engine's own queue knows tenants and priorities, Ray's does not.
        max_ongoing_requests=engine_config.max_num_seqs + config.max_num_queued_reqs,
        ray_actor_options={
            "num_cpus": settings.num_cpus_per_replica,
            "num_gpus": num_gpus(engine_config, settings),
        },
        request_router_config={
            "request_router_class": EngineRouter,
            "request_router_kwargs": asdict(
                RouterSettings(routing=settings.routing, max_imbalance=settings.max_imbalance)
            ),
        },
        graceful_shutdown_timeout_s=shutdown_s,
        graceful_shutdown_wait_loop_s=DRAIN_POLL_S,
        logging_config=dict(QUIET),
        **_scale(engine_config, settings),
    )(EngineReplica)
    ingress = serve.deployment(
        name=INGRESS_DEPLOYMENT,
        max_ongoing_requests=UNBOUNDED_REQUESTS,
        # A machine with as many cores as engines has room for it too.
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=shutdown_s,
        graceful_shutdown_wait_loop_s=DRAIN_POLL_S,
        logging_config=dict(QUIET),
    )(serve.ingress()(Ingress))
    return ingress.bind(engines.bind(engine_config, config), engine_config, config)


def check_device(engine_config: EngineConfig) -> None:
    """Checks that engines leave it to Ray which GPU is whose.

    Raises:
        ConfigError: The device is one of a machine's GPUs by number.
    """
    device = engine_config.device
    if ":" in device:
        raise ConfigError(f"device must be auto, cpu or cuda, got {device!r}", "device")


def num_gpus(engine_config: EngineConfig, settings: RaySettings) -> float:
    """GPUs that each engine reserves; asks Ray whether there are any.

    Raises:
        ConfigError: Those that were asked for are fewer than the ranks that need one each.
    """
    device, asked = engine_config.device, settings.num_gpus_per_replica
    num_ranks = engine_config.tensor_parallel_size
    if asked is not None:
        if num_ranks > 1 and device != "cpu" and 0.0 < asked < num_ranks:
            raise ConfigError(
                f"num_gpus_per_replica must be at least tensor_parallel_size ({num_ranks}), "
                f"got {asked:g}",
                "num_gpus_per_replica",
            )
        return asked
    if device == "auto":
        return float(num_ranks) if ray.cluster_resources().get("GPU", 0.0) else 0.0
    return 0.0 if device == "cpu" else float(num_ranks)


def _proxys(name: str) -> ConfigError:
    return ConfigError(f"{name} is a matter of Ray Serve's http_options", name)


def _scale(engine_config: EngineConfig, settings: RaySettings) -> dict[str, Any]:
    if settings.max_replicas is None:
        return {"num_replicas": settings.fewest_replicas}
    target = settings.target_ongoing_requests or engine_config.max_num_seqs
    return {
        "autoscaling_config": {
            "min_replicas": settings.fewest_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": target,
            "upscale_delay_s": settings.upscale_delay,
            "downscale_delay_s": settings.downscale_delay,
        }
    }
