"""Writes the screenshots of docs/images: the page after a replica was killed, and on a phone."""

import os
import signal

from playwright.sync_api import Browser, Page, ViewportSize, expect

from benchmarks.serving import ROOT
from tests.page.browser import started_browser
from tests.system.running import RECEIPT, Running

FOLDER = ROOT / "docs" / "images"
WIDE: ViewportSize = {"width": 1280, "height": 940}
PHONE: ViewportSize = {"width": 390, "height": 844}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with Running("--vision", "3") as system, started_browser() as browser:
        page = open_page(browser, system, PHONE, is_dark=True)
        page.evaluate("scrollTo(0, document.getElementById('text').offsetTop - 100)")
        page.screenshot(path=FOLDER / "page-phone.png")
        page.close()
        page = open_page(browser, system, WIDE, is_dark=False)
        victim = system.members("vision")[-1]
        os.kill(victim.pid, signal.SIGKILL)
        expect(page.locator(f"[data-id={victim.id}]")).to_have_attribute("data-state", "dead")
        expect(page.locator("[data-role=vision] .member")).to_have_count(4)
        page.screenshot(path=FOLDER / "page.png", full_page=True)


def open_page(browser: Browser, system: Running, size: ViewportSize, is_dark: bool) -> Page:
    """Return the page after it asked about the sample image."""
    page = browser.new_page(
        viewport=size, color_scheme="dark" if is_dark else "light", reduced_motion="reduce"
    )
    page.goto(system.url("/ui"))
    expect(page.locator("#health")).to_have_text("ready")
    page.set_input_files("#files", RECEIPT)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#progress")).to_have_text("Done.")
    return page


if __name__ == "__main__":
    main()
