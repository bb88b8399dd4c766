"""Measure a checkpoint's character error rate on held-out images.

    python evaluate.py ../../models/tiny-ocr --n 64 --report cer.md

The images come from the training generator with another seed: fonts and layouts are known to the
model, the texts are not.
"""

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from kinds import HELD_OUT, pick_grid
from PIL import Image
from reader import Reader, edit_distance
from render import sample
from settings import ROLM_PROMPT


@dataclass
class Score:
    images: int = 0
    exact: int = 0
    characters: int = 0
    wrong: int = 0
    seconds: float = 0.0

    def add(self, text: str, answer: str, seconds: float) -> None:
        self.images += 1
        self.exact += answer == text
        self.characters += len(text)
        self.wrong += edit_distance(answer, text)
        self.seconds += seconds

    def row(self, name: str) -> str:
        rate = self.wrong / self.characters
        share = self.exact / self.images
        seconds = self.seconds / self.images
        return (
            f"| {name} | {self.images} | {rate:.4f} | {share:.3f} | "
            f"{self.characters} | {seconds:.2f} |"
        )


def held_out(name: str, count: int, seed: int) -> Iterator[tuple[Image.Image, str]]:
    """-> images with their texts"""
    kind_name, look = HELD_OUT[name]
    rng = random.Random(f"{seed} {name}")
    for _ in range(count):
        drawn = sample(rng, kind_name, look, *pick_grid(rng, kind_name))
        yield Image.fromarray(drawn.image), drawn.text


def arguments() -> argparse.Namespace:
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("checkpoint", type=Path)
    a.add_argument("--n", type=int, default=64, help="images of each kind")
    a.add_argument("--kinds", default=",".join(HELD_OUT))
    a.add_argument("--seed", type=int, default=20)
    a.add_argument("--prompt", default=ROLM_PROMPT)
    a.add_argument("--system", help="a system prompt instead of the template's own")
    a.add_argument("--fp32", action="store_true", help="bf16 otherwise")
    a.add_argument("--report", type=Path, help="also write the table to this file")
    a.add_argument(
        "--show", type=int, default=0, help="print this many answers of each kind that differ"
    )
    return a.parse_args()


def score_kind(reader: Reader, name: str, args: argparse.Namespace) -> Score:
    score = Score()
    shown = 0
    for image, text in held_out(name, args.n, args.seed):
        start = time.monotonic()
        answer = reader.read(image, args.prompt, args.system)
        score.add(text, answer, time.monotonic() - start)
        if answer != text and shown < args.show:
            shown += 1
            print(f"{name}: {text!r}\n   read {answer!r}", flush=True)
    return score


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    reader = Reader(args.checkpoint, torch.float32 if args.fp32 else torch.bfloat16)
    lines = [
        "| kind | images | CER | exact | characters | seconds an image |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for name in args.kinds.split(","):
        lines.append(score_kind(reader, name, args).row(name))
        print(lines[-1], flush=True)
    if args.report:
        args.report.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
