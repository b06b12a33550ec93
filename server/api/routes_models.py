"""``GET /v1/models``."""

from fastapi import APIRouter

from headlong.server.api.schemas_models import ModelCard, ModelList
from headlong.server.api.serving import Serving
from headlong.server.http_errors import error_docs


def models_router(serving: Serving) -> APIRouter:
    """Makes the endpoints that say what is served."""
    router = APIRouter()

    def card(name: str) -> ModelCard:
        return ModelCard(
            id=name,
            object="model",
            created=serving.created,
            owned_by="headlong",
            max_model_len=serving.limits.max_model_len,
        )

    @router.get("/v1/models", responses=error_docs(401, 500))
    async def models() -> ModelList:
        """Lists the names under which the model is served."""
        return ModelList(object="list", data=[card(name) for name in serving.model_names])

    # Names of models have slashes in them.
    @router.get("/v1/models/{model:path}", responses=error_docs(401, 404, 500))
    async def model(model: str) -> ModelCard:
        """Describes one model."""
        serving.require_model(model)
        return card(model)

    return router
