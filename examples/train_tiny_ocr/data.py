"""Training batches, made in a second process; all images of one batch share one grid and one
prompt."""

import multiprocessing as mp
import random
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Empty, Full

import numpy as np
import torch
from kinds import KINDS, TRAINING, Look, pick_grid
from render import Sample, sample
from settings import DEFAULT_SYSTEM, LONG_PROMPTS, SHORT_PROMPTS, SYSTEMS, TOKEN
from words import EVERYDAY

Mix = dict[str, float]  # a kind's share of the batches
IGNORED = -1  # beyond the end of an answer


@dataclass
class Batch:
    images: torch.Tensor  # uint8 [samples, height, width]
    slots: torch.Tensor  # [samples, cells, SLOTS]
    answers: torch.Tensor  # [samples, longest]
    places: torch.Tensor  # [samples, longest]
    before: torch.Tensor  # tokens of the prompt in front of the image
    after: torch.Tensor


def pick_system(rng: random.Random, long: bool) -> str | None:
    r = rng.random() - (0.4 if long else 0.0)
    if r < 0.25:
        return DEFAULT_SYSTEM
    return rng.choice(SYSTEMS) if r < 0.35 else None


def pick_prompt(rng: random.Random, long: bool) -> str:
    if rng.random() < 0.06:
        return " ".join(rng.choice(EVERYDAY) for _ in range(rng.randint(1, 8)))
    return rng.choice(LONG_PROMPTS if rng.random() < (0.6 if long else 0.1) else SHORT_PROMPTS)


def prompt(rng: random.Random, long: bool) -> tuple[list[int], list[int]]:
    """-> the tokens before the image and those after it, up to where the answer starts"""
    start = TOKEN["<|im_start|>"]
    end = TOKEN["<|im_end|>"]
    system = pick_system(rng, long)
    text = list(pick_prompt(rng, long).encode())
    before = [start, *f"system\n{system}".encode(), end, 10] if system else []
    text_first = rng.random() < 0.12
    before += [start, *b"user\n", *(text if text_first else []), TOKEN["<|vision_start|>"]]
    return before, [
        TOKEN["<|vision_end|>"],
        *([] if text_first else text),
        end,
        10,
        start,
        *b"assistant\n",
    ]


def padded(rows: list[np.ndarray], filler: int) -> torch.Tensor:
    out = np.full((len(rows), max(map(len, rows))), filler, np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)


def collate(samples: list[Sample], before: list[int], after: list[int]) -> Batch:
    return Batch(
        images=torch.from_numpy(np.stack([s.image for s in samples])),
        slots=torch.from_numpy(np.stack([s.slots for s in samples])).long(),
        answers=padded([s.answer for s in samples], IGNORED),
        places=padded([s.places for s in samples], 0),
        before=torch.tensor(before),
        after=torch.tensor(after),
    )


def make_batch(rng: random.Random, kind_name: str, look: Look, budget: int, long: bool) -> Batch:
    """`budget`: cells; a token of the prompt or the answer counts as a third of one."""
    rows, columns = pick_grid(rng, kind_name)
    before, after = prompt(rng, long)
    tokens = len(before) + len(after) + KINDS[kind_name].expected
    count = max(3, min(96, int(budget / (rows * columns + tokens / 3))))
    return collate(
        [sample(rng, kind_name, look, rows, columns) for _ in range(count)], before, after
    )


def worker(queue: mp.Queue, mix: Mix, budget: int, long_share: float, seed: int) -> None:
    torch.set_num_threads(1)
    rng = random.Random(seed)
    while True:
        kind_name = rng.choices(list(mix), list(mix.values()))[0]
        batch = make_batch(rng, kind_name, TRAINING, budget, rng.random() < long_share)
        try:
            queue.put({name: tensor.numpy() for name, tensor in vars(batch).items()}, timeout=600)
        except Full:  # no step takes so long: the trainer was killed
            return


class Stream:
    """Batches of one mix without end, until it is closed."""

    def __init__(self, mix: Mix, budget: int, long_share: float, seed: int) -> None:
        context = mp.get_context("spawn")
        self.queue = context.Queue(6)
        self.process = context.Process(
            target=worker, args=(self.queue, mix, budget, long_share, seed), daemon=True
        )
        self.process.start()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield Batch(**{name: torch.from_numpy(array) for name, array in self.get().items()})

    def get(self) -> dict[str, np.ndarray]:
        while True:
            try:
                return self.queue.get(timeout=5)
            except Empty:
                if not self.process.is_alive():
                    raise RuntimeError(
                        "the process that makes the images has died: see its error above"
                    ) from None

    def close(self) -> None:
        self.process.terminate()
        self.process.join()
