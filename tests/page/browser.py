"""Debian's Chromium, driven by Playwright. Playwright's own browsers are not used."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, expect, sync_playwright

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
MILLISECONDS = 60_000.0
"""How long the page may take for anything."""
MISSING = "no Chromium on PATH: `scripts/browser` installs Debian's"


def chromium() -> str | None:
    """Return the path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def started_browser() -> Iterator[Browser]:
    """Run Chromium inside the block, without its sandbox if this is root."""
    path = chromium()
    assert path, MISSING
    expect.set_options(timeout=MILLISECONDS)
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            browser.close()
