"""``GET /v1/models`` and ``GET /health``."""

from fastapi import APIRouter

from headlong.server.errors import EngineDeadError
from headlong.server.http_errors import error_docs
from headlong.server.schemas_models import Health, ModelCard, ModelList
from headlong.server.serving import Serving


def models_router(serving: Serving) -> APIRouter:
    """Makes the endpoints that say what is served, and whether it can be."""
    router = APIRouter()

    def card(name: str) -> ModelCard:
        return ModelCard(
            id=name,
            object="model",
            created=serving.created,
            owned_by="headlong",
            max_model_len=serving.limits.max_model_len,
        )

    @router.get("/v1/models", responses=error_docs(500))
    async def models() -> ModelList:
        """Lists the names under which the model is served."""
        return ModelList(object="list", data=[card(name) for name in serving.model_names])

    # Names of models have slashes in them.
    @router.get("/v1/models/{model:path}", responses=error_docs(404, 500))
    async def model(model: str) -> ModelCard:
        """Describes one model."""
        serving.require_model(model)
        return card(model)

    @router.get("/health", responses=error_docs(503))
    async def health() -> Health:
        """Says whether the engine is alive."""
        if not serving.engine.is_alive:
            raise EngineDeadError("the engine is not running")
        return Health(status="ok")

    return router
