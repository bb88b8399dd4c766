"""The program of sandboxes in which a video never ends, crashes, or takes all memory."""

import os
import runpy
from collections.abc import Iterator

from PIL import Image

from services.preprocess import videos
from services.preprocess.sandbox import meter

meter.ITEM_SECONDS["video"] = 0.3


def hostile(clip: videos.ListedFrames) -> Iterator[Image.Image]:
    """Do what the first frame's width says."""
    _, width = clip.size
    match width:
        case 28:
            while True:
                pass
        case 56:
            os.abort()
        case 84:
            taken = []
            while True:
                taken.append(bytearray(2**26))
    yield from decoded(clip)


decoded = videos.ListedFrames.frames
videos.ListedFrames.frames = hostile  # type: ignore[method-assign]

if __name__ == "__main__":
    runpy.run_module("services.preprocess.sandbox.child", run_name="__main__")
