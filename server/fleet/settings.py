"""Settings of the replicas that Ray Serve runs."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from headlong.server.config import ENV_PREFIX
from headlong.server.errors import ConfigError
from headlong.server.flag import Flag

Routing = Literal["prefix", "random", "least-loaded"]

_REPLICAS = "Replicas"


class RaySettings(BaseSettings):
    """How many engines there are, where they run and who gets which request.

    Raises:
        ConfigError: Two settings contradict each other.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid"
    )

    num_replicas: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Flag("Engines, each with the model and a cache of its own.", _REPLICAS, default="1"),
    ] = None
    min_replicas: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Flag("Fewest engines, when their number follows the load.", _REPLICAS, default="1"),
    ] = None
    max_replicas: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Flag("Most engines; with it their number follows the load.", _REPLICAS),
    ] = None
    target_ongoing_requests: Annotated[
        Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None,
        Flag(
            "Requests that each engine should have, when their number follows the load.",
            _REPLICAS,
            default="--max-num-seqs",
        ),
    ] = None
    upscale_delay: Annotated[
        float,
        Field(ge=0.0, allow_inf_nan=False),
        Flag("Seconds that the load must be higher before there are more engines.", _REPLICAS),
    ] = 30.0
    downscale_delay: Annotated[
        float,
        Field(ge=0.0, allow_inf_nan=False),
        Flag("Seconds that the load must be lower before there are fewer engines.", _REPLICAS),
    ] = 600.0
    num_gpus_per_replica: Annotated[
        Annotated[float, Field(ge=0.0, allow_inf_nan=False)] | None,
        Flag(
            "GPUs that each engine reserves.",
            _REPLICAS,
            default="0 with --device cpu, --tensor-parallel-size with cuda, and with auto so many "
            "where the cluster has GPUs",
        ),
    ] = None
    num_cpus_per_replica: Annotated[
        Annotated[float, Field(gt=0.0, allow_inf_nan=False)],
        Flag("CPU cores that each engine reserves, and threads that it computes with.", _REPLICAS),
    ] = 1.0
    routing: Annotated[
        Routing,
        Flag(
            "Who gets a request: prefix takes the engine that holds most of its prompt, if that is "
            "not too busy.",
            _REPLICAS,
        ),
    ] = "prefix"
    max_imbalance: Annotated[
        int,
        Field(ge=0),
        Flag(
            "Requests that an engine may have more than the least busy one and still be preferred "
            "for what it holds.",
            _REPLICAS,
        ),
    ] = 8

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        for name in ("min_replicas", "target_ongoing_requests"):
            if getattr(self, name) is not None and self.max_replicas is None:
                raise ConfigError(f"{name} needs --max-replicas", name)
        if self.max_replicas is not None:
            if self.num_replicas is not None:
                raise ConfigError(
                    "num_replicas is a fixed number, leave it out beside --max-replicas",
                    "num_replicas",
                )
            if (self.min_replicas or 1) > self.max_replicas:
                raise ConfigError(
                    f"min_replicas must be at most max_replicas ({self.max_replicas}), "
                    f"got {self.min_replicas}",
                    "min_replicas",
                )
        return self

    @property
    def fewest_replicas(self) -> int:
        """Engines that there are without any load."""
        return (self.num_replicas if self.max_replicas is None else self.min_replicas) or 1


PROXY_SETTINGS = (
    "host",
    "port",
    "max_header_bytes",
    "send_timeout",
    "ssl_keyfile",
    "ssl_certfile",
    "ssl_keyfile_password",
    "ssl_ca_certs",
)
"""Settings of a server that are Ray Serve's, because its proxy has the clients' connections."""
WITHOUT_EFFECT = ("max_header_bytes", "send_timeout")
"""Of these, the ones that Ray's proxy does not have."""
