"""What a real server tells of itself after a few requests."""

from functools import cache

from starlette.testclient import TestClient

from headlong.demo.paths import MODEL_DIR
from headlong.server.app import create_app
from headlong.server.async_engine import AsyncEngine
from headlong.server.config import ServerConfig
from support.engines import build_engine

PLAIN = "text/plain"


def real_scrape(accept: str = PLAIN) -> str:
    """The text of ``/metrics``, of the embedded model with its compressed cache."""
    return _scrapes()[accept]


@cache
def _scrapes() -> dict[str, str]:
    engine = build_engine(MODEL_DIR, max_model_len=512, canary_rate=1.0)
    config = ServerConfig(served_model_name=("demo",))
    with TestClient(create_app(AsyncEngine(engine), config)) as client:
        for fields in ({"n": 2}, {"stream": True}, {"model": "other"}):
            body = {"model": "demo", "prompt": "The letters of the year " * 8, "max_tokens": 4}
            client.post("/v1/completions", json={**body, **fields})
        return {
            accept: client.get("/metrics", headers={"Accept": accept}).text
            for accept in (PLAIN, "application/openmetrics-text")
        }
