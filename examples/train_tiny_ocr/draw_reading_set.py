"""Draw the images of tests/golden/reading, whose error rate a test guards, and their texts.

    python draw_reading_set.py ../../tests/golden/reading

They come from the training generator with a seed of their own. The fonts and the library that draws
differ between machines, so the images are kept, not drawn again.
"""

import json
import random
import sys
from pathlib import Path

from kinds import HELD_OUT, pick_grid
from PIL import Image
from render import sample

SEED = 14
COUNTS = {"short": 6, "line": 6, "3 lines": 4, "light on dark": 4, "receipt": 3, "title": 1}
LONGEST = 110  # characters: longer answers take long on a CPU


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, count in COUNTS.items():
        kind, look = HELD_OUT[name]
        rng = random.Random(f"{SEED} {name}")
        while count:
            drawn = sample(rng, kind, look, *pick_grid(rng, kind))
            if len(drawn.text) > LONGEST:
                continue
            file = f"{name.replace(' ', '-')}-{count}.png"
            Image.fromarray(drawn.image).save(folder / file, optimize=True)
            rows.append(json.dumps({"image": file, "text": drawn.text}, ensure_ascii=False))
            count -= 1
    (folder / "pages.jsonl").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
