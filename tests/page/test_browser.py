"""The page in a browser, on a gateway that follows a script."""

import asyncio
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, expect

from common.boxes import Box
from common.errors import Exhausted, InvalidRequest, Unavailable
from common.messages import Usage
from services.gateway.generation import Began, Boxes, Ended, Piece, Result
from services.gateway.record import RequestState
from tests.gateway.fake_core import FOREVER, HELLO, TIMINGS
from tests.page.browser import MISSING, chromium, started_browser
from tests.page.fake_gateway import FakeGateway, member, pipeline
from tests.system.running import until

pytestmark = pytest.mark.skipif(chromium() is None, reason=MISSING)

USAGE = Usage(prompt_tokens=9, image_tokens=4, completion_tokens=3, cached_tokens=2)
Open = Callable[..., Page]


def png(color: str = "white", size: tuple[int, int] = (60, 40)) -> dict[str, Any]:
    """A file for the page's input."""
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "PNG")
    return {"name": f"{color}.png", "mimeType": "image/png", "buffer": out.getvalue()}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def running() -> Iterator[FakeGateway]:
    with FakeGateway() as gateway:
        yield gateway


@pytest.fixture
def gateway(running: FakeGateway) -> FakeGateway:
    running.core.requests.clear()
    running.answer()
    running.state = None
    running.show(pipeline(member("vision-0-abc", credits=2)))
    return running


@pytest.fixture
def open_page(browser: Browser, gateway: FakeGateway) -> Iterator[Open]:
    """Opens the page. At the end nothing was blocked or failed, and all came from the gateway."""
    pages: list[Page] = []
    problems: list[str] = []

    def on_console(message: ConsoleMessage) -> None:
        # The browser logs each answer that is an error, which some tests are about.
        if message.type in ("error", "warning") and "Failed to load" not in message.text:
            problems.append(message.text)

    def open_page(**context: Any) -> Page:
        page = browser.new_context(**context).new_page()
        pages.append(page)
        page.on("console", on_console)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith((gateway.url.removesuffix("ui"), "data:", "blob:"))
                else problems.append(request.url)
            ),
        )
        page.goto(gateway.url)
        expect(page.locator("#health")).to_have_text("ready")
        return page

    yield open_page
    for page in pages:
        page.context.close()
    assert problems == []


def send(page: Page) -> None:
    page.get_by_role("button", name="Send").click()


def test_an_image_and_a_question_are_sent_and_the_answer_is_streamed(
    open_page: Open, gateway: FakeGateway
) -> None:
    gate = asyncio.Event()
    gateway.answer(*HELLO[:2], gate, *HELLO[2:])
    page = open_page()
    page.set_input_files("#files", [png("white"), png("red")])
    expect(page.get_by_role("img", name="white.png")).to_be_visible()
    page.get_by_role("button", name="Remove white.png").click()
    page.get_by_label("Question").fill("What colour?")
    page.get_by_text("Options").click()
    page.get_by_label("Most tokens").fill("7")
    page.get_by_label("Temperature").fill("0.5")
    send(page)
    expect(page.locator("#text")).to_have_text("Hel")
    expect(page.locator("#progress")).to_have_text("Answering")
    gateway.set(gate)
    expect(page.locator("#text")).to_have_text("Hello")
    expect(page.locator("#progress")).to_have_text("Done.")
    expect(page.locator("#spoken")).to_have_text("Hello")
    (asked,) = gateway.core.requests
    assert asked.images == (png("red")["buffer"],)
    assert b"What colour?" in asked.prompt
    assert (asked.stopping.max_tokens, asked.sampling.temperature) == (7, 0.5)
    assert re.fullmatch("[0-9a-f]{32}", asked.request_id)


def test_images_can_be_dropped_and_pasted(open_page: Open) -> None:
    page = open_page()
    transfer = page.evaluate_handle(
        """bytes => {
            const transfer = new DataTransfer();
            const file = new File([new Uint8Array(bytes)], "some.png", {type: "image/png"});
            transfer.items.add(file);
            return transfer;
        }""",
        list(png()["buffer"]),
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    expect(page.get_by_role("img", name="some.png")).to_have_count(1)
    page.evaluate(
        """transfer => document.dispatchEvent(
            new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true}))""",
        transfer,
    )
    expect(page.get_by_role("img", name="some.png")).to_have_count(2)


def test_stop_aborts_the_request(open_page: Open, gateway: FakeGateway) -> None:
    gateway.answer(*HELLO[:2], FOREVER)
    gateway.core.aborted.clear()
    page = open_page()
    send(page)
    expect(page.locator("#text")).to_have_text("Hel")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#progress")).to_have_text("Stopped.")
    expect(page.locator("#text")).to_have_text("Hel")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    gateway.wait_for(gateway.core.aborted)


@pytest.mark.parametrize(
    ("refusal", "shown"),
    [
        (
            Exhausted("3 requests are waiting", "gateway", retry_after=4.2),
            "3 requests are waiting (429). Try again in 5 seconds.",
        ),
        (InvalidRequest("image 1 is empty"), "image 1 is empty (400)"),
        (Unavailable("no vision is connected", "vision"), "no vision is connected (503)"),
    ],
    ids=["429", "400", "503"],
)
def test_a_refusal_is_shown(
    open_page: Open, gateway: FakeGateway, refusal: Exception, shown: str
) -> None:
    gateway.answer(refusal=refusal)
    page = open_page()
    send(page)
    expect(page.get_by_role("alert")).to_have_text(shown)
    gateway.answer()
    send(page)
    expect(page.locator("#text")).to_have_text("Hello")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_an_error_in_the_middle_of_an_answer_is_shown_below_its_text(
    open_page: Open, gateway: FakeGateway
) -> None:
    gateway.answer(*HELLO[:2], Unavailable("the language group was lost", "llm"))
    page = open_page()
    send(page)
    expect(page.get_by_role("alert")).to_contain_text("the language group was lost")
    expect(page.locator("#text")).to_have_text("Hel")


def test_a_lost_network_is_shown_and_the_page_recovers(open_page: Open) -> None:
    page = open_page()
    page.route("**/v1/**", lambda route: route.abort())
    send(page)
    expect(page.get_by_role("alert")).to_contain_text("The connection to the gateway is lost.")
    page.unroute("**/v1/**")
    send(page)
    expect(page.locator("#text")).to_have_text("Hello")


def test_what_a_model_writes_is_text(open_page: Open, gateway: FakeGateway) -> None:
    written = "<img src=x onerror=alert(1)> & <b>bold</b>"
    gateway.answer(Began(None), Piece(0, [1], written, []), HELLO[-1])
    page = open_page()
    send(page)
    expect(page.locator("#text")).to_have_text(written)
    expect(page.locator("#text > *")).to_have_count(0)


def test_boxes_are_drawn_at_their_places_and_listed(open_page: Open, gateway: FakeGateway) -> None:
    boxes = [Box("cat", [(60, 40), (300, 200)]), Box("", [(0, 0), (9, 0), (9, 9), (0, 9)])]
    gateway.answer(*HELLO[:-1], Ended("stop", USAGE, TIMINGS, Boxes(1, boxes)))
    page = open_page()
    page.set_input_files("#files", [png("white"), png("red", (600, 400))])
    send(page)
    expect(page.locator("figure")).to_have_count(1)
    expect(page.locator("figcaption li")).to_have_text(
        ["cat: (60, 40) to (300, 200)", "box: (0, 0) to (9, 0) to (9, 9) to (0, 9)"]
    )
    expect(page.locator(".frame img")).to_have_attribute("alt", "red.png, with 2 boxes")
    picture = page.locator(".frame img").bounding_box()
    drawn = page.locator("polygon").first.bounding_box()
    assert picture and drawn
    scale = picture["width"] / 600
    middle = drawn["x"] + drawn["width"] / 2, drawn["y"] + drawn["height"] / 2
    assert middle[0] - picture["x"] == pytest.approx(180 * scale, abs=1)
    assert middle[1] - picture["y"] == pytest.approx(120 * scale, abs=1)
    # Miters count, too.
    assert drawn["width"] == pytest.approx(240 * scale, abs=10)


def test_an_image_whose_file_has_gone_is_named(open_page: Open, tmp_path: Path) -> None:
    file = tmp_path / "gone.png"
    file.write_bytes(png()["buffer"])
    page = open_page()
    page.set_input_files("#files", file)
    expect(page.locator("#images li")).to_have_count(1)
    file.unlink()
    send(page)
    expect(page.locator("#error")).to_have_text("gone.png cannot be read any more. Remove it.")
    expect(page.locator("#send")).to_be_visible()


def test_the_timings_are_a_bar_by_stage_whose_parts_do_not_overlap(
    open_page: Open, gateway: FakeGateway
) -> None:
    """The language model waited 0.4 s of its prefill for the image."""
    image = {"preprocess_seconds": 0.1, "queue_seconds": 0.2, "encode_seconds": 0.3}
    timings = {
        "preprocess_seconds": 0.1,
        "images": [image, image | {"encode_seconds": 0.1, "cached": True}],
        "queue_seconds": 0.1,
        "prefill_seconds": 0.5,
        "decode_seconds": 0.25,
        "time_to_first_token_seconds": 0.75,
        "total_seconds": 1.0,
    }
    gateway.answer(*HELLO[:-1], Ended("stop", USAGE, timings))
    page = open_page()
    send(page)
    rows = page.locator(".legend tr")
    expect(rows).to_have_text(
        [
            "Preprocess100 ms",
            "Vision queue200 ms",
            "Encode300 ms",
            "LLM queue0 ms",
            "Prefill100 ms",
            "Decode250 ms",
            "Rest50 ms",
        ]
    )
    whole = page.locator(".bar").bounding_box()
    encode = page.locator(".bar span").nth(2).bounding_box()
    assert whole and encode
    assert encode["width"] / whole["width"] == pytest.approx(0.3, abs=0.02)
    expect(page.locator(".images tbody tr")).to_have_text(
        ["1100 ms200 ms300 ms", "2100 ms200 mscached"]
    )
    expect(page.locator("#timings")).to_contain_text(
        "1.00 s in all · first token after 750 ms · 9 prompt tokens, 4 of images · 2 of them cached"
    )


def test_a_classifier_shows_its_likeliest_labels(open_page: Open, gateway: FakeGateway) -> None:
    values = np.array([0.25, 0.75], np.float32)
    gateway.answer(Began(None), Result(values, ["no", "yes"], USAGE, TIMINGS))
    gateway.show(pipeline(member("vision-0-abc"), tasks=["classify"], model="vlmo"))
    page = open_page()
    expect(page.locator("#model")).to_have_text("vlmo")
    send(page)
    expect(page.locator("#text")).to_have_text("yes")
    expect(page.locator("#labels tr")).to_have_text(["yes75.0 %", "no25.0 %"])


def test_an_embedding_is_shown_by_its_first_values(open_page: Open, gateway: FakeGateway) -> None:
    values = np.linspace(0, 1, 101, dtype=np.float32)
    gateway.answer(Began(None), Result(values, [], USAGE, TIMINGS))
    gateway.show(pipeline(member("vision-0-abc"), tasks=["embed"], model="vlmo"))
    page = open_page()
    expect(page.locator("#model")).to_have_text("vlmo")
    send(page)
    expect(page.locator("#text")).to_contain_text("A vector of 101 values: 0.0000, 0.0100, ")
    expect(page.locator(".legend tr")).to_have_count(7)


def test_replicas_appear_drain_and_die(open_page: Open, gateway: FakeGateway) -> None:
    page = open_page()
    first = page.locator("[data-id=vision-0-abc]")
    expect(first).to_contain_text("ready")
    expect(first).to_contain_text("2 places free")
    loading = member("vision-1-def", "starting", detail="loading weights, 40%")
    busy = member("vision-0-abc", in_flight=2, queued=1, expected_delay=0.3)
    gateway.show(pipeline(busy, loading))
    second = page.locator("[data-id=vision-1-def]")
    expect(second).to_contain_text("loading weights, 40%")
    expect(first).to_contain_text("2 in work · 1 queued")
    expect(first).to_contain_text("the next begins in 300 ms")
    gateway.show(pipeline(member("vision-0-abc", "dead"), member("vision-1-def")))
    expect(first).to_have_attribute("data-state", "dead")
    expect(second).to_have_attribute("data-state", "ready")
    expect(page.locator("#changes")).to_have_text("vision-0-abc: dead, vision-1-def: ready")
    gateway.show(pipeline(member("vision-1-def", "draining")))
    expect(first).to_have_count(0)
    expect(second).to_have_attribute("data-state", "draining")


def test_a_hidden_page_keeps_no_connection(open_page: Open, gateway: FakeGateway) -> None:
    """A browser opens six at most, so six hidden pages would keep the seventh from asking."""
    page = open_page()
    assert gateway.num_watchers == 1
    hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true})"
    tell = "document.dispatchEvent(new Event('visibilitychange'))"
    page.evaluate(f"{hide % 'true'}; {tell}")
    until(lambda: gateway.num_watchers == 0, "the feed is closed")
    page.evaluate(f"{hide % 'false'}; {tell}")
    until(lambda: gateway.num_watchers == 1, "the feed is open")


def test_a_pipeline_that_is_not_ready_or_not_known_says_so(
    open_page: Open, gateway: FakeGateway
) -> None:
    page = open_page()
    gateway.show(pipeline(unready="no vision is ready", is_current=False))
    expect(page.locator("#health")).to_have_text("no vision is ready")
    expect(page.locator("#pipeline-state")).to_contain_text("the controller cannot be reached")


def test_the_stage_that_works_on_the_request_is_marked(
    open_page: Open, gateway: FakeGateway
) -> None:
    gate = asyncio.Event()
    gateway.answer(gate, *HELLO)
    page = open_page()
    gateway.state = RequestState("vision", "", 0, 2, 0)
    send(page)
    mark = page.locator("[data-role=vision]").get_by_text("your request is here")
    expect(mark).to_be_visible()
    expect(page.locator("#progress")).to_have_text("In vision: 2 images left")
    gateway.state = RequestState("gateway", "llm was lost while it held the request", 1, 0, 0)
    expect(page.locator("#progress")).to_contain_text("llm was lost while it held the request")
    gateway.set(gate)
    expect(page.locator("#text")).to_have_text("Hello")
    expect(mark).to_be_hidden()


def test_the_keyboard_is_enough(open_page: Open, gateway: FakeGateway) -> None:
    gateway.answer(*HELLO[:2], FOREVER)
    page = open_page()
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the question")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Question")).to_be_focused()
    page.keyboard.type(" All of it.")
    page.keyboard.press("Enter")
    expect(page.locator("#text")).to_have_text("Hel")
    for _ in range(2):
        page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Stop")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#progress")).to_have_text("Stopped.")
    expect(page.get_by_role("button", name="Send")).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_scrolling_to_the_side(
    open_page: Open, gateway: FakeGateway, scheme: str
) -> None:
    long = "x" * 300
    gateway.answer(Began(None), Piece(0, [1], long, []), HELLO[-1])
    page = open_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page.set_input_files("#files", [png("white", (2000, 100))])
    send(page)
    expect(page.locator("#text")).to_have_text(long)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", back)))
    assert (brightness < 3 * 64) == (scheme == "dark")
