"""``GET /metrics``."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from headlong.server.http_errors import error_docs
from headlong.server.telemetry.metrics import Metrics


def metrics_router(metrics: Metrics) -> APIRouter:
    """Makes the endpoint that Prometheus scrapes."""
    router = APIRouter()

    @router.get(
        "/metrics",
        response_class=Response,
        responses={
            200: {
                "description": "All metrics, in the text format that was asked for",
                "content": {
                    "text/plain": {"schema": {"type": "string"}},
                    "application/openmetrics-text": {"schema": {"type": "string"}},
                },
            },
            **error_docs(401, 500),
        },
    )
    async def scrape(request: Request) -> Response:
        """Tells how the engine and its requests do."""
        content, content_type = metrics.expose(request.headers.get("accept", ""))
        return Response(content, headers={"Content-Type": content_type})

    return router
