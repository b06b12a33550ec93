"""Bodies of ``GET /v1/models``, ``GET /health`` and ``GET /ready``."""

from typing import Literal

from headlong.server.api.schemas_common import ResponseModel


class ModelCard(ResponseModel):
    """One name under which the model is served.

    Attributes:
        max_model_len: Most tokens of prompt and completion together.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(ResponseModel):
    """All names under which the model is served."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(ResponseModel):
    """The engine is alive."""

    status: Literal["ok"]


class Readiness(ResponseModel):
    """New requests are taken."""

    status: Literal["ready"]
