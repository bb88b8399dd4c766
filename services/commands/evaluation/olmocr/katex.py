"""Equations rendered by KaTeX in a browser: what each symbol is, and where it is.

Both come from the machine: Debian has them as `libjs-katex` and `chromium-headless-shell`. The
browser is driven by Playwright and never reaches a network, because an answer's LaTeX is not to be
trusted.
"""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from services.commands.client import ClientError
from services.commands.evaluation.olmocr.equations import Rendered, Symbol

if TYPE_CHECKING:
    from playwright.sync_api import Route

KATEX_FOLDERS = ("/usr/share/javascript/katex", "/usr/share/nodejs/katex/dist")
"""Where Debian's packages have KaTeX."""
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
MAX_LATEX_CHARS = 20_000
ADDRESS = "http://katex.invalid/"
OWN_FILES = r"katex\.min\.(js|css)|fonts/[\w-]+\.\w+"
PAGE = """<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="katex.min.css">
<script src="katex.min.js"></script><div id="equation" style="font-size: 24px"></div>"""
RENDER = r"""async (latex) => {
    const place = document.getElementById("equation");
    try {
        katex.render(latex, place, {displayMode: true, throwOnError: true});
    } catch (error) {
        return null;
    }
    await document.fonts.ready;
    const isSymbol = (span) => span.children.length === 0 && /\S/.test(span.textContent);
    const symbols = [...place.querySelectorAll("span")].filter(isSymbol).map((span) => {
        const box = span.getBoundingClientRect();
        return [span.textContent, box.x, box.y, box.width, box.height];
    });
    return {mathml: place.querySelector(".katex-mathml math").outerHTML, symbols};
}"""


class NoMath(ClientError):
    """Equations cannot be rendered here; the message says what is missing."""


class Katex:
    """A browser page that renders equations, as a context manager."""

    def __init__(self, folder: Path | None = None) -> None:
        """Find what is needed. `folder` has katex.min.js, its style sheet and fonts.

        Raises
        ------
        NoMath
            If something is missing.
        """
        self._folder = folder or _katex_folder()
        if not (self._folder / "katex.min.js").exists():
            raise NoMath(f"{self._folder} has no katex.min.js")
        self._browser = next(filter(None, map(shutil.which, BROWSERS)), None)
        if self._browser is None:
            raise NoMath("there is no Chromium; Debian's package is chromium-headless-shell")
        if find_spec("playwright") is None:
            raise NoMath("there is no Playwright; run: pip install playwright")
        self._rendered: dict[str, Rendered | None] = {}

    def __enter__(self) -> "Katex":
        from playwright.sync_api import Error, sync_playwright

        self._playwright = sync_playwright().start()
        try:
            browser = self._playwright.chromium.launch(executable_path=self._browser)
            self._page = browser.new_page(viewport={"width": 800, "height": 400})
            self._page.route("**/*", self._serve)
            self._page.goto(ADDRESS)
        except Error as e:
            self._playwright.stop()
            raise NoMath(f"{self._browser} does not run: {e.message.splitlines()[0]}") from e
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._playwright.stop()

    def render(self, latex: str) -> Rendered | None:
        """Return the rendered equation; None if KaTeX does not understand it.

        Raises
        ------
        NoMath
            If the browser fails.
        """
        from playwright.sync_api import Error

        if latex not in self._rendered:
            result = None
            if len(latex) <= MAX_LATEX_CHARS:
                try:
                    result = self._page.evaluate(RENDER, latex)
                except Error as e:
                    raise NoMath(f"the browser failed: {e.message.splitlines()[0]}") from e
            self._rendered[latex] = _rendered(result) if result else None
        return self._rendered[latex]

    def _serve(self, route: "Route") -> None:
        """Answer the page's requests with KaTeX's files, and no others."""
        name = route.request.url.removeprefix(ADDRESS)
        file = self._folder / name
        if not name:
            route.fulfill(body=PAGE, content_type="text/html")
        elif re.fullmatch(OWN_FILES, name) and file.is_file():
            route.fulfill(path=file)
        else:
            route.abort()


def _katex_folder() -> Path:
    for folder in map(Path, KATEX_FOLDERS):
        if folder.exists():
            return folder
    raise NoMath("there is no KaTeX; Debian's package is libjs-katex, or name its folder (--katex)")


def _rendered(result: dict[str, Any]) -> Rendered:
    return Rendered(result["mathml"], [Symbol(*symbol) for symbol in result["symbols"]])
