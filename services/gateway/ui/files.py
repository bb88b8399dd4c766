"""The files of the page. No path of a request reaches the file system."""

import hashlib
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

FILES = {
    "index.html": "text/html; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "answer.js": "text/javascript; charset=utf-8",
    "api.js": "text/javascript; charset=utf-8",
    "boxes.js": "text/javascript; charset=utf-8",
    "dom.js": "text/javascript; charset=utf-8",
    "images.js": "text/javascript; charset=utf-8",
    "pipeline.js": "text/javascript; charset=utf-8",
    "timings.js": "text/javascript; charset=utf-8",
}
"""The media type of each file in `static`."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""The page loads nothing from elsewhere, and runs nothing that was not in its files."""

HEADERS = {
    "cache-control": "no-cache",  # the browser asks each time, and is told that nothing changed
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class File:
    """One file as an endpoint."""

    def __init__(self, name: str) -> None:
        self._body = files(__package__).joinpath("static", name).read_bytes()
        etag = f'"{hashlib.blake2b(self._body, digest_size=12).hexdigest()}"'
        self._headers = HEADERS | {"content-type": FILES[name], "etag": etag}

    async def respond(self, request: Request) -> Response:
        """Return the file, or 304 if the client has it already."""
        if self._headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=self._headers)
        return Response(self._body, headers=self._headers)
