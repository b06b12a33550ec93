"""``GET /health`` and ``GET /ready``."""

from fastapi import APIRouter

from headlong.server.api.schemas_models import Health, Readiness
from headlong.server.api.serving import Serving
from headlong.server.errors import DrainingError, EngineDeadError
from headlong.server.http_errors import error_docs


def health_router(serving: Serving) -> APIRouter:
    """Makes the endpoints that orchestrators ask."""
    router = APIRouter()

    @router.head("/health", include_in_schema=False)
    @router.get("/health", responses=error_docs(500, 503))
    async def health() -> Health:
        """Says whether the engine is alive: it works on its requests, or has none."""
        if not serving.engine.is_alive:
            raise EngineDeadError("the engine is not running")
        return Health(status="ok")

    @router.get("/ready", responses=error_docs(401, 500, 503))
    async def ready() -> Readiness:
        """Says whether new requests are taken."""
        if serving.engine.state == "draining":
            raise DrainingError("the server is shutting down")
        if not serving.engine.is_alive:
            raise EngineDeadError("the engine is not running")
        return Readiness(status="ready")

    return router
