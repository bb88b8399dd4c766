"""Which web pages may use the API: cross-origin resource sharing (CORS), for every endpoint.

The page at /ui is apart: it comes from the gateway itself, and no other page reads what is under
its path.
"""

import re

from starlette.datastructures import Headers
from starlette.responses import Response

from services.gateway.limits import MAX_ECHOED_BYTES

LOOPBACK = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?")
"""The origins of pages that the client's own machine serves."""
ANY = "*"
USUAL_PORTS = {"http": ":80", "https": ":443"}
METHODS = "GET, HEAD, POST"
USUAL_HEADERS = "authorization, content-type, content-encoding, x-request-id, x-request-timeout"
HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~ ,-]+")
EXPOSED = "x-request-id, retry-after, allow"
MAX_AGE_SECONDS = 7200
"""How long a browser may keep the answer to a preflight. Browsers keep none for longer."""


class Cors:
    """The pages that may use the API: those of the client's own machine, and those listed."""

    def __init__(self, origins: str = "") -> None:
        """`origins` are further origins, separated by commas, or `*` for all."""
        self._listed = {plain_origin(origin) for origin in origins.split(",")} - {""}

    def headers(self, origin: str | None) -> list[tuple[str, str]]:
        """Return what every response to a request from this origin has; None if it names none."""
        if origin is None or not self._allows(origin):
            return []
        return [
            ("access-control-allow-origin", origin),
            ("access-control-expose-headers", EXPOSED),
            ("vary", "Origin"),
        ]

    def preflight(self, headers: Headers) -> Response | None:
        """Return the answer to a browser that asks what a page may send.

        It lacks what every response has. None if the request with these headers is not such a
        question, or if the page may send nothing.
        """
        if "access-control-request-method" not in headers:
            return None
        if not self._allows(headers.get("origin", "")):
            return None
        wanted = headers.get("access-control-request-headers", "")
        is_plain = len(wanted) <= MAX_ECHOED_BYTES and HEADER_NAMES.fullmatch(wanted)
        answer = {
            "access-control-allow-methods": METHODS,
            "access-control-allow-headers": wanted if is_plain else USUAL_HEADERS,
            "access-control-max-age": str(MAX_AGE_SECONDS),
        }
        if headers.get("access-control-request-private-network") == "true":
            answer["access-control-allow-private-network"] = "true"
        return Response(status_code=204, headers=answer)

    def _allows(self, origin: str) -> bool:
        if ANY in self._listed:
            return bool(origin)
        return bool(LOOPBACK.fullmatch(origin)) or plain_origin(origin) in self._listed


def plain_origin(origin: str) -> str:
    """Return an origin as browsers write it: in lower case, without the port of its scheme."""
    origin = origin.strip().lower().removesuffix("/")
    scheme, _, _ = origin.partition("://")
    return origin.removesuffix(USUAL_PORTS.get(scheme, ""))
