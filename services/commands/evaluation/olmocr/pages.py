"""A page of a PDF as an image.

PDFs come from outside, and the library that reads them is in C. So each page is rendered in a
process of its own, which may take only so much memory and time:

    python -m services.commands.evaluation.olmocr.pages FILE.pdf PAGE LONGEST_SIDE > PAGE.png
"""

import resource
import subprocess
import sys
from pathlib import Path

from services.commands.evaluation.task import BadItem

MAX_MEMORY = 2 << 30
MAX_SECONDS = 60


class UnreadablePage(BadItem):
    """A page of a PDF cannot be rendered; the message says why."""


def page_image(pdf: Path, page: int, longest_side: int) -> bytes:
    """Return a page, counted from 1, as a PNG file whose longest side has this many pixels.

    Raises:
        UnreadablePage: The file is not a PDF, has no such page, or is too much work.
    """
    command = [sys.executable, "-m", __spec__.name, str(pdf), str(page), str(longest_side)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=MAX_SECONDS)
    except subprocess.TimeoutExpired:
        reason = f"rendering takes over {MAX_SECONDS} s"
        raise UnreadablePage(f"{pdf}, page {page}: {reason}") from None
    if done.returncode != 0:
        *_, reason = (done.stderr.decode(errors="replace").strip() or "it crashed").splitlines()
        raise UnreadablePage(f"{pdf}, page {page}: {reason}")
    return done.stdout


def main(file: str, page: str, longest_side: str) -> None:
    """Write the page to stdout."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(file)
        if int(page) > len(document):
            sys.exit(f"the file has only {len(document)} pages")
        found = document[int(page) - 1]
        scale = int(longest_side) / max(found.get_size())
        image = found.render(scale=scale).to_pil()
    except (pypdfium2.PdfiumError, OSError, MemoryError, ZeroDivisionError) as e:
        sys.exit(f"{type(e).__name__}: {e}")
    image.save(sys.stdout.buffer, "PNG")


if __name__ == "__main__":
    main(*sys.argv[1:])
