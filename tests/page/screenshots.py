"""Writes the screenshots of docs/images: the page at work, and the dark page on a phone."""

from pathlib import Path

from playwright.sync_api import Browser, Page, ViewportSize

from benchmarks.serving import ROOT
from tests.page.browser import started_browser
from tests.system.running import RECEIPT, Running

FOLDER = ROOT / "docs" / "images"
WIDE: ViewportSize = {"width": 1280, "height": 940}
PHONE: ViewportSize = {"width": 390, "height": 844}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with Running("--vision", "2") as system, started_browser() as browser:
        url = system.url("/ui")
        take(browser, url, FOLDER / "page.png", WIDE, is_dark=False)
        take(browser, url, FOLDER / "page-phone.png", PHONE, is_dark=True)


def take(browser: Browser, url: str, file: Path, size: ViewportSize, is_dark: bool) -> None:
    """Ask about the sample image, and write what the page looks like then."""
    context = browser.new_context(
        viewport=size, color_scheme="dark" if is_dark else "light", reduced_motion="reduce"
    )
    page = context.new_page()
    page.goto(url)
    ask(page)
    page.screenshot(path=file, full_page=True)
    context.close()


def ask(page: Page) -> None:
    page.get_by_text("ready", exact=True).first.wait_for()
    page.set_input_files("#files", RECEIPT)
    page.get_by_role("button", name="Send").click()
    page.locator("#progress", has_text="Done.").wait_for()


if __name__ == "__main__":
    main()
