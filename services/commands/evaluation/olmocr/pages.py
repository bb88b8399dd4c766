"""A page of a PDF as an image.

PDFs come from outside, and the library that reads them is in C. So each page is rendered in a
process of its own, which may take only so much memory and time.
"""

import subprocess
import sys
from pathlib import Path

from services.commands.evaluation.task import BadItem

RENDER = "services.commands.evaluation.olmocr.render"
MAX_SECONDS = 60


def page_image(pdf: Path, page: int, longest_side: int) -> bytes:
    """Return a page, counted from 1, as a PNG file whose longest side has this many pixels.

    Raises
    ------
    BadItem
        If the file is not a PDF, has no such page, or is too much work.
    """
    command = [sys.executable, "-m", RENDER, str(pdf), str(page), str(longest_side)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=MAX_SECONDS)
    except subprocess.TimeoutExpired:
        raise BadItem(f"{pdf}, page {page}: rendering takes over {MAX_SECONDS} s") from None
    if done.returncode != 0:
        *_, reason = (done.stderr.decode(errors="replace").strip() or "it crashed").splitlines()
        raise BadItem(f"{pdf}, page {page}: {reason}")
    return done.stdout
