"""The page on a running system."""

import os
import signal
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from common.membership import READY
from tests.page.browser import MISSING, chromium, started_browser
from tests.system.running import RECEIPT, Running, until

pytestmark = pytest.mark.skipif(chromium() is None, reason=MISSING)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started_browser() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, embedded: Running) -> Iterator[Page]:
    page = browser.new_page()
    page.goto(embedded.url("/ui"))
    expect(page.locator("#health")).to_have_text("ready")
    yield page
    page.close()


def test_the_receipt_is_read(page: Page) -> None:
    page.set_input_files("#files", RECEIPT)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#progress")).to_have_text("Done.")
    expect(page.locator("#text")).to_contain_text("CORNER BAKERY")
    expect(page.locator("#text")).to_contain_text("TOTAL 19.75")
    expect(page.locator(".legend tr")).to_have_count(7)
    expect(page.locator("#timings")).to_contain_text("prompt tokens")


def test_a_stopped_request_is_freed_in_every_stage(page: Page, embedded: Running) -> None:
    (group,) = embedded.members("llm")
    os.kill(group.pid, signal.SIGSTOP)
    try:
        page.set_input_files("#files", RECEIPT)
        page.get_by_role("button", name="Send").click()
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#progress")).to_have_text("Stopped.")
    finally:
        os.kill(group.pid, signal.SIGCONT)
    expect(page.locator("#text")).to_be_empty()
    embedded.await_idle()


def test_a_killed_replica_and_its_successor_are_shown(page: Page, embedded: Running) -> None:
    victim = embedded.members("vision")[0]
    card = page.locator(f"[data-id={victim.id}]")
    expect(card).to_have_attribute("data-state", "ready")
    os.kill(victim.pid, signal.SIGKILL)
    expect(card).to_have_attribute("data-state", "dead")
    ready = page.locator("[data-role=vision] [data-state=ready]")
    expect(ready).to_have_count(2)
    assert victim.id not in {m.id for m in embedded.members("vision")}
    until(lambda: len(embedded.in_state("vision", READY)) == 2, "the successor is ready")


def test_an_unreadable_image_is_an_error_in_words(page: Page) -> None:
    broken = {"name": "broken.png", "mimeType": "image/png", "buffer": b"not an image"}
    page.set_input_files("#files", [broken])
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("alert")).to_contain_text("this is text, which is not read here")
