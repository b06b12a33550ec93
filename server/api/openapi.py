"""The document of the API."""

from typing import Any

from fastapi import FastAPI

from headlong.server.auth import OPEN_PATHS

SCHEME = "api_key"


class DocumentedAPI(FastAPI):
    """An application whose OpenAPI document says what its handlers and middleware do.

    Args:
        needs_key: Whether requests need an API key.
        options: FastAPI's.
    """

    def __init__(self, *, needs_key: bool, **options: Any) -> None:
        super().__init__(**options)
        self._needs_key = needs_key

    def openapi(self) -> dict[str, Any]:
        """Returns the document."""
        if self.openapi_schema is None:
            document = super().openapi()
            _drop_fastapis_own_error(document)
            if self._needs_key:
                _ask_for_key(document)
            self.openapi_schema = document
        return self.openapi_schema


def _drop_fastapis_own_error(document: dict[str, Any]) -> None:
    # FastAPI would answer 422 to what does not fit its schema; here that is a 400.
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def _ask_for_key(document: dict[str, Any]) -> None:
    document["components"]["securitySchemes"] = {SCHEME: {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["security"] = [] if path in OPEN_PATHS else [{SCHEME: []}]
