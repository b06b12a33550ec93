"""``GET /``: the playground and live view, and the files that it is made of."""

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

PAGE_DIR = Path(__file__).parent / "page"
_SCRIPT = "text/javascript; charset=utf-8"
PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
    "/page/main.js": ("main.js", _SCRIPT),
    "/page/api.js": ("api.js", _SCRIPT),
    "/page/bars.js": ("bars.js", _SCRIPT),
    "/page/chat.js": ("chat.js", _SCRIPT),
    "/page/dom.js": ("dom.js", _SCRIPT),
    "/page/example.js": ("example.js", _SCRIPT),
    "/page/format.js": ("format.js", _SCRIPT),
    "/page/headmap.js": ("headmap.js", _SCRIPT),
    "/page/live.js": ("live.js", _SCRIPT),
    "/page/sparkline.js": ("sparkline.js", _SCRIPT),
}
"""Of each path, the file in `PAGE_DIR` and its content type. Nothing else is served from there."""

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def page_router() -> APIRouter:
    """Makes the endpoints of the page. Its files are read now, and once.

    Raises:
        OSError: A file of the page is missing from the installation.
    """
    router = APIRouter(include_in_schema=False)
    for path, (name, media_type) in PAGE_FILES.items():
        file = _PageFile((PAGE_DIR / name).read_bytes(), media_type)
        router.add_api_route(path, file.respond, methods=["GET", "HEAD"])
    return router


class _PageFile:
    def __init__(self, content: bytes, media_type: str) -> None:
        self._content = content
        self._media_type = media_type
        self._etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'

    async def respond(self, request: Request) -> Response:
        """Sends the file, unless the browser has this very version."""
        # A new version of the server must not meet an old script.
        headers = {**SECURITY_HEADERS, "ETag": self._etag, "Cache-Control": "no-cache"}
        if self._is_known(request.headers.getlist("if-none-match")):
            return Response(status_code=304, headers=headers)
        return Response(self._content, headers=headers, media_type=self._media_type)

    def _is_known(self, lines: list[str]) -> bool:
        """Compares weakly, as If-None-Match asks for: RFC 9110, section 13.1.2."""
        known = {tag.strip().removeprefix("W/") for line in lines for tag in line.split(",")}
        return self._etag in known or "*" in known
