"""A prompt, template, guide or image that costs much to open ends a sandbox, never preprocess."""

import json
import os
import queue
import shutil
import signal
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.checkpoint import BadCheckpoint
from common.pixel_bounds import PixelBounds
from services.preprocess.sandbox import pool
from services.preprocess.sandbox.jobs import Prepare, Prepared, Read, ReadDone, Refused, Setup
from services.preprocess.sandbox.meter import NOTHING, read_mark
from services.preprocess.sandbox.pool import AGING, Finished, Sandboxes, Task
from services.preprocess.videos import VideoForm
from tests.golden import GoldenCase
from tests.preprocess.cases import encoded, noise
from tests.system.running import ROOT

MODEL = ROOT / "models" / "tiny-ocr"
VIDEO_MODEL = GoldenCase("e_video").checkpoint
PATIENCE_SECONDS = 120.0
"""A limit of 3 s of CPU time takes longer on a busy machine."""


class Running:
    """Sandboxes of a model, and what they have posted."""

    def __init__(self, model: Path = MODEL, size: int = 2, **setup: Any) -> None:
        self.posted: queue.Queue[object] = queue.Queue()
        self.sandboxes = Sandboxes(Setup(str(model), 4096, **setup), size)
        try:
            self.sandboxes.wait_until_loaded()
        except BadCheckpoint:
            self.sandboxes.close()
            raise
        self.sandboxes.begin(self.posted.put)

    def next_finished(self) -> Finished:
        while True:
            event = self.posted.get(timeout=PATIENCE_SECONDS)
            if finished := self.sandboxes.handle(event):
                return finished

    def do(self, task: Task) -> Any:
        self.sandboxes.start(task)
        finished = self.next_finished()
        assert finished.task is task
        return finished.result


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    found = Running()
    yield found
    found.sandboxes.close()


def preparing(*files: bytes, seconds: float = 0.01, first: int = 0) -> Task:
    return Task(Prepare(first, ("image",) * len(files), 0), files, seconds)


def reading(
    *files: bytes,
    text: str = "hi",
    guide_kind: str = "",
    guide: bytes = b"",
    has_room: bool = False,
) -> Task:
    content = [*({"type": "image"} for _ in files), {"type": "text", "text": text}]
    prompt = json.dumps([{"role": "user", "content": content}]).encode()
    job = Read("messages", guide_kind, ("image",) * len(files), 0, False)
    return Task(job, [prompt, b"", guide, b"", *files], 0.002)


IMAGE = encoded(noise(56, 56))
JPEG = encoded(noise(56, 56), "JPEG")


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_segments(kind: int, data: bytes, number: int) -> bytes:
    """A JPEG with this segment many times in its header."""
    segment = bytes((0xFF, kind)) + struct.pack(">H", 2 + len(data)) + data
    return JPEG[:2] + segment * number + JPEG[2:]


SLOW = with_segments(0xFE, b"AB", 3_000_000)
"""A picture that takes longer than the limit to open."""


def frames(format: str) -> bytes:
    """An animation of which only the first frame may be decoded."""
    first = Image.new("RGB", (1000, 1000))
    others = [Image.new("RGB", (1000, 1000), (n, n, n)) for n in range(1, 20)]
    return encoded(first, format, save_all=True, append_images=others)


def is_unreadable(result: object, index: int = 0) -> bool:
    return isinstance(result, Refused) and (result.code, result.item) == ("UnreadableImage", index)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# Images


def test_an_image_is_prepared_as_without_a_sandbox(running: Running) -> None:
    running.sandboxes.start(preparing(IMAGE, JPEG))
    finished = running.next_finished()
    assert isinstance(finished.result, Prepared)
    assert [facts.grid_thw for facts in finished.result.items] == [(1, 4, 4)] * 2
    assert [len(blob) for blob in finished.blobs] == [56 * 56 * 3] * 2
    rows = np.frombuffer(finished.blobs[0], np.uint8).reshape(2, 2, 2, 2, 3, 14, 14)
    pixels = rows.transpose(0, 2, 5, 1, 3, 6, 4).reshape(56, 56, 3)
    assert np.array_equal(pixels, noise(56, 56))


def test_a_header_that_takes_seconds_to_read_is_refused(running: Running) -> None:
    """Pillow joins the Exif segments of a JPEG one by one, in quadratic time."""
    file = with_segments(0xE1, b"Exif\0\0AB", 1_000_000)
    assert is_unreadable(running.do(reading(IMAGE, file)), index=1)
    assert isinstance(running.do(reading(IMAGE)), ReadDone)


def test_an_image_that_takes_seconds_to_decode_is_refused(running: Running) -> None:
    assert is_unreadable(running.do(preparing(SLOW, first=3)), index=3)
    assert isinstance(running.do(preparing(IMAGE)), Prepared)


def test_an_image_that_takes_too_much_memory_is_refused(running: Running) -> None:
    webp = encoded(Image.new("RGB", (7000, 7000)), "WEBP", lossless=True, quality=0, method=0)
    assert is_unreadable(running.do(preparing(webp)))
    assert isinstance(running.do(preparing(IMAGE)), Prepared)


@pytest.mark.parametrize(
    "text", [b"zTXt", b"iTXt", b"iCCP", b"tEXt"], ids=lambda text: text.decode()
)
def test_a_bomb_in_the_header_of_a_png_is_refused_or_left_packed(
    running: Running, text: bytes
) -> None:
    bomb = zlib.compress(bytes(2**28), 9)
    data = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\1\0\0\0", b"iCCP": b"k\0\0", b"tEXt": b"k\0"}[text]
    file = IMAGE[:33] + chunk(text, data + bomb) + IMAGE[33:]
    result = running.do(reading(file))
    assert is_unreadable(result) or isinstance(result, ReadDone)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "MPO", "TIFF"])
def test_of_an_animation_only_the_first_frame_is_decoded(running: Running, format: str) -> None:
    result = running.do(preparing(frames(format)))
    assert isinstance(result, Prepared) and result.items[0].grid_thw[0] == 1


def test_a_sandbox_reads_only_the_formats_that_are_on_and_keeps_to_the_bounds() -> None:
    running = Running(size=1, image_formats=("jpeg",))
    result = running.do(reading(JPEG, IMAGE))
    assert is_unreadable(result, index=1)
    assert result.message == (
        "image 1: this is a png file, which is not read here; send an image in one of the formats "
        "jpeg"
    )
    file = encoded(noise(280, 280), "JPEG")
    bounds = {2: PixelBounds(max_pixels=16 * 784)}
    job = Prepare(1, ("image",) * 2, 0, {}, bounds)
    done = running.do(Task(job, [file, file], 0.01))
    assert [item.num_tokens for item in done.items] == [100, 16]
    running.sandboxes.close()


TIFF_FIELDS = {256: 56, 257: 56, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 56, 279: 56 * 56}


def directory(fields: dict[int, int], behind: int = 0) -> bytes:
    """A directory of a TIFF, and where the next one is."""
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    return struct.pack("<H", len(fields)) + entries + struct.pack("<I", behind)


def tiff_of_pages(count: int) -> bytes:
    size = len(directory(TIFF_FIELDS))
    pages = [directory(TIFF_FIELDS, 8 + size * (n + 1)) for n in range(count - 1)]
    return b"II*\0" + struct.pack("<I", 8) + b"".join(pages) + directory(TIFF_FIELDS) + bytes(56**2)


def tiff_of_overlapping_tags() -> bytes:
    """A TIFF with 200 fields of 10 MB, which are the same bytes."""
    entries = b"".join(struct.pack("<HHII", 1000 + n, 1, 10**7, 8) for n in range(200))
    table = struct.pack("<H", 200) + entries + b"\0\0\0\0"
    return b"II*\0" + struct.pack("<I", 8) + table + bytes(10**7)


HOSTILE: dict[str, bytes] = {
    "a TIFF of overlapping fields": tiff_of_overlapping_tags(),
    "a TIFF of 60,000 samples": b"II*\0\x08\0\0\0" + directory(TIFF_FIELDS | {277: 60_000}),
    "a TIFF that ends in its header": b"II*\0\x08\0\0\0" + directory(TIFF_FIELDS)[:30],
    "a JPEG 2000 with a box beyond it": encoded(noise(8, 8), "JPEG2000")[:12] + b"\xff" * 60,
    "an AVIF whose boxes are cut": encoded(noise(56, 56), "AVIF")[:200],
    "a BMP with a palette beyond it": b"BM"
    + struct.pack("<IHHIIiiHHIIiiII", 0, 0, 0, 54, 40, 56, 56, 1, 8, 0, 0, 0, 0, 2**31, 0),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_alone(running: Running, kind: str) -> None:
    assert is_unreadable(running.do(preparing(HOSTILE[kind])))
    assert isinstance(running.do(preparing(IMAGE)), Prepared)


@pytest.mark.parametrize("behind", [8, 0], ids=["its own", "no"])
def test_a_tiff_whose_next_page_is_a_page_before_is_read(running: Running, behind: int) -> None:
    file = b"II*\0\x08\0\0\0" + directory(TIFF_FIELDS, behind) + bytes(56**2)
    assert isinstance(running.do(preparing(file)), Prepared)


def test_of_a_tiff_of_many_pages_only_the_first_is_read(running: Running) -> None:
    result = running.do(preparing(tiff_of_pages(100_000)))
    assert isinstance(result, Prepared) and result.items[0].seconds < 1


@pytest.mark.parametrize(
    ("format", "size"), [("TIFF", (7100, 7100)), ("BMP", (2**31 - 1, 1)), ("TIFF", (2**31, 2**31))]
)
def test_a_bomb_of_any_format_is_refused_by_its_header(
    running: Running, format: str, size: tuple[int, int]
) -> None:
    width, height = size
    file = b"II*\0\x08\0\0\0" + directory(TIFF_FIELDS | {256: width, 257: height})
    if format == "BMP":
        header = (40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
        file = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 0, 0, 0, 54, *header)
    result = running.do(reading(file))
    assert isinstance(result, Refused) and (result.code, result.item) == ("TooLarge", 0)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL], ids=str)
def test_an_image_that_ends_its_sandbox_is_refused_and_the_next_one_is_served(
    running: Running, number: int
) -> None:
    sandboxes: Any = running.sandboxes
    running.sandboxes.start(preparing(SLOW))
    [busy] = [s for s in sandboxes._sandboxes if s.task]
    while read_mark(busy.mark) == NOTHING:
        time.sleep(0.001)
    for pid in children_of(sandboxes._program.pid):
        os.kill(pid, number)
    assert is_unreadable(running.next_finished().result)
    assert isinstance(running.do(preparing(IMAGE)), Prepared)


# Videos


def clips(*widths: int, first: int = 0) -> Task:
    """Prepare videos of two frames."""
    frames = [encoded(noise(28, width)) for width in widths]
    forms = {n: VideoForm((len(frame),) * 2) for n, frame in enumerate(frames, first)}
    files = [frame * 2 for frame in frames]
    return Task(Prepare(first, ("video",) * len(files), 0, forms), files, 0.01)


@pytest.mark.parametrize("width", [28, 56, 84], ids=["hangs", "crashes", "takes all memory"])
def test_a_decoder_that_never_ends_fails_its_video_alone(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr(pool, "PROGRAM", ["tests.security.videos_that_hang"])
    running = Running(VIDEO_MODEL, size=1)
    result = running.do(clips(112, width, first=2))
    assert is_unreadable(result, index=3) or (width == 84 and result.code == "InvalidRequest")
    assert "takes too much" in result.message
    done = running.do(clips(112, 140))
    assert isinstance(done, Prepared) and [item.num_tokens for item in done.items] == [4, 5]
    running.sandboxes.close()


def test_a_video_file_is_decoded_in_a_sandbox() -> None:
    made = pytest.importorskip("tests.videos", exc_type=ImportError)
    running = Running(VIDEO_MODEL, size=1)
    long = made.encoded_video(made.grey_frames(2) * 1500, 30)
    forms = {0: VideoForm()}
    result = running.do(Task(Prepare(0, ("video",), 0, forms), [long], 0.01))
    assert isinstance(result, Prepared) and result.items[0].grid_thw == (64, 4, 6)
    cut = running.do(Task(Prepare(0, ("video",), 0, forms), [long[: len(long) // 2]], 0.01))
    assert is_unreadable(cut)
    running.sandboxes.close()


# Prompts, templates and guides


def model_with(folder: Path, **files: str) -> Path:
    shutil.copytree(MODEL, folder / "model")
    for name, text in files.items():
        file = folder / "model" / name.replace("__", ".")
        file.unlink(missing_ok=True)
        file.write_text(text)
    return folder / "model"


TIME_BOMB = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)
MEMORY_BOMB = (
    "{% set found = namespace(text=messages[0].content[0].text) %}"
    "{% for a in range(40) %}{% set found.text = found.text + found.text %}{% endfor %}"
)


@pytest.mark.parametrize(
    "bomb", [TIME_BOMB, MEMORY_BOMB, "{{ 'a' * 9999999999 }}"], ids=["time", "memory", "constant"]
)
def test_a_template_that_takes_too_much_fails_the_request_and_names_the_template(
    tmp_path: Path, bomb: str
) -> None:
    running = Running(model_with(tmp_path, chat_template__jinja=bomb), size=1)
    result = running.do(reading())
    assert result.code == "InvalidRequest" and "chat template" in result.message
    running.sandboxes.close()


def test_a_template_that_takes_too_much_to_compile_is_a_bad_checkpoint(tmp_path: Path) -> None:
    bomb = "{{ 9 ** (9 ** 9) }}"
    with pytest.raises(BadCheckpoint, match="the chat template takes too much time"):
        Running(model_with(tmp_path, chat_template__jinja=bomb))


@pytest.mark.parametrize(
    ("kind", "guide"),
    [
        ("regex", b"[a-"),
        ("json_schema", b"\xff\xfe"),
        ("json_schema", b"[" * 500_000),
    ],
)
def test_a_guide_that_cannot_be_followed_fails_its_request(
    running: Running, kind: str, guide: bytes
) -> None:
    result = running.do(reading(guide_kind=kind, guide=guide))
    assert result.code == "InvalidRequest" and len(result.message) < 500
    assert isinstance(running.do(reading(guide_kind="json_object")), ReadDone)


@pytest.mark.parametrize("prompt", [b"[" * 500_000, b"\xff", b"", b"{", b"3"])
def test_messages_that_are_none_fail_their_request(running: Running, prompt: bytes) -> None:
    result = running.do(Task(Read("messages", "", (), 0, False), [prompt, b"", b"", b""], 0.002))
    assert isinstance(result, Refused) and result.code == "InvalidRequest"


# Turns


def test_a_cheap_task_overtakes_costly_ones_and_they_overtake_newer_ones_in_time() -> None:
    running = Running(size=1)
    sandboxes: Any = running.sandboxes
    costly = [preparing(IMAGE, seconds=1.0) for _ in range(3)]
    cheap = preparing(IMAGE)
    for task in [*costly, cheap]:
        sandboxes.start(task)
    assert [s.task for s in sandboxes._sandboxes] == [costly[0], cheap]
    late = [preparing(IMAGE, seconds=0.5), preparing(IMAGE, seconds=0.5)]
    for task, queued in zip(late, (0.0, AGING), strict=True):
        sandboxes.start(task)
        task.queued = costly[1].queued + queued
    order = [running.next_finished().task for _ in range(6)]
    order.remove(cheap)
    assert order == [costly[0], late[0], costly[1], costly[2], late[1]]
    running.sandboxes.close()


def test_a_task_that_takes_unexpectedly_long_leaves_room_for_others() -> None:
    running = Running(size=1)
    slow = [preparing(SLOW) for _ in range(2)]
    for task in slow:
        running.sandboxes.start(task)
    cheap = reading()
    running.sandboxes.start(cheap)
    finished = running.next_finished()
    assert finished.task is cheap and isinstance(finished.result, ReadDone)
    running.sandboxes.close()


def test_tasks_are_done_after_the_program_was_killed() -> None:
    running = Running(size=1)
    sandboxes: Any = running.sandboxes
    sandboxes._program.kill()
    sandboxes._program.wait()
    assert isinstance(running.do(preparing(IMAGE)), Prepared)
    running.sandboxes.close()


def test_sandboxes_end_with_their_program() -> None:
    running = Running(size=1)
    running.do(preparing(IMAGE))
    sandboxes: Any = running.sandboxes
    sandboxes._program.kill()
    event: Any = running.posted.get(timeout=PATIENCE_SECONDS)
    assert event.message is None and event.sandbox in sandboxes._sandboxes
    running.sandboxes.close()


def test_memory_of_results_is_used_again_once_nothing_refers_to_it(running: Running) -> None:
    sandboxes: Any = running.sandboxes
    for _ in range(40):
        running.do(preparing(IMAGE))
    assert sandboxes._spares._num_made <= 2
    kept = []
    for _ in range(20):
        running.sandboxes.start(preparing(IMAGE))
        kept.append(running.next_finished().blobs[0])
    assert len({bytes(blob) for blob in kept}) == 1
