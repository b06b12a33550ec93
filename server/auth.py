"""Lets nobody in without a key."""

import base64
import binascii

from starlette.types import ASGIApp, Receive, Scope, Send

from headlong.server.api_keys import ApiKeys
from headlong.server.errors import AuthenticationError
from headlong.server.http_errors import error_response, note_error

OPEN_PATHS = frozenset({"/health"})


class AuthMiddleware:
    """Answers 401 unless the request carries a known key, before anything reads its body.

    The key comes as ``Authorization: Bearer KEY``, as the password of ``Authorization: Basic`` with
    any user, so that a browser can ask for it, or as ``X-API-Key``. The key's name becomes
    ``request.state.tenant``.

    Args:
        app: The application inside.
        keys: At least one.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        # The path that is routed on, and not one put together with the Host header.
        tenant = "" if scope["path"] in OPEN_PATHS else self._tenant(scope)
        if tenant is None:
            error = AuthenticationError(
                "a valid API key is needed: send the header 'Authorization: Bearer KEY'"
            )
            note_error(scope, error)
            await error_response(error)(scope, receive, send)
            return
        scope.setdefault("state", {})["tenant"] = tenant
        await self._app(scope, receive, send)

    def _tenant(self, scope: Scope) -> str | None:
        found: str | None = None
        for name, value in scope["headers"]:
            if (key := _key_in(name, value)) is not None:
                found = self._keys.name_of(key) or found
        return found


def _key_in(name: bytes, value: bytes) -> bytes | None:
    if name == b"x-api-key":
        return value.strip()
    if name != b"authorization":
        return None
    scheme, _, rest = value.partition(b" ")
    if scheme.lower() == b"bearer":
        return rest.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return None
    return None
