"""What is wrong with the text of a setting, in words; empty if nothing is."""

import os
import re

from common.errors import shorten

MAX_SOCKET_PATH_BYTES = 107
"""The longest path of a Unix socket on Linux (unix(7))."""
MAX_NAME_CHARS = 190
"""The longest name that a setting gives. A member id is a name and a suffix, of at most 200
characters together; a name may be that of a host in a cluster."""
MAX_TEXT_CHARS = 250
SOCKET_SCHEMES = ("ipc://", "unix://", "unix:")


def objection_to_address(text: str) -> str:
    """Return why nobody can listen on an address, or connect to it.

    A path that is too long would only show as a peer that never answers.
    """
    for scheme in SOCKET_SCHEMES:
        if text.startswith(scheme):
            return objection_to_socket_path(text.removeprefix(scheme))
    return objection_to_text(text)


def objection_to_socket_path(path: str) -> str:
    length = len(os.fsencode(os.path.abspath(path)))
    if "\0" in path or length > MAX_SOCKET_PATH_BYTES:
        return (
            f"the path of a socket may have at most {MAX_SOCKET_PATH_BYTES} bytes, and this one "
            f"has {length}: use a shorter one"
        )
    return ""


def objection_to_name(text: str) -> str:
    """Return why a text cannot be part of member ids and of file names."""
    if len(text) > MAX_NAME_CHARS or not re.fullmatch(r"[A-Za-z0-9._-]*", text):
        return f"give at most {MAX_NAME_CHARS} letters, digits, dots, hyphens and underscores"
    return ""


def objection_to_text(text: str) -> str:
    """Return why a text cannot be shown to people and sent to others."""
    if len(text) > MAX_TEXT_CHARS or not text.isprintable():
        return f"give at most {MAX_TEXT_CHARS} printable characters"
    return ""


def objection_to_http_url(text: str) -> str:
    """Return why a text is not the URL of a service. An empty text names none."""
    if text and not re.match(r"https?://[^/\s]+", text):
        return "give http://HOST:PORT, or https:// for TLS"
    return objection_to_text(text)


def objection_to_origins(text: str) -> str:
    """Return why a text is not a list of origins of web pages. An empty text names none."""
    for origin in text.split(",") if text else ():
        if not re.fullmatch(r"\*|[A-Za-z][A-Za-z0-9+.-]*://[^/\s,*]+/?", origin.strip()):
            return (
                f"{shorten(origin)!r} is not an origin: give SCHEME://HOST or SCHEME://HOST:PORT, "
                "separated by commas, or * for all"
            )
    return ""
