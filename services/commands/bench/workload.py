"""What a load test asks: prompts of random words about synthetic images."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from services.commands.bench.pictures import pictures

WORD_TEXT = """
time year way day thing man world life hand part child eye place work week case point company number
group problem fact house water room mother area money story month book job word side kind head far
game line end law car city name team minute idea body back face level office door health art war
history party result change morning reason research girl guy moment air
"""
WORDS = WORD_TEXT.split()
"""Short common words, most of which are one token in most vocabularies."""
HELD_IMAGES = 1000
"""A repeated image is one of this many that came before it."""


@dataclass(frozen=True)
class Ask:
    """One request. The images come before the text."""

    text: str
    images: list[bytes]
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    """How requests are made. Two workloads with the same values make the same requests."""

    width: int
    height: int
    kind: str
    """jpeg or png."""
    images_per_request: int
    same_share: float
    """The share of images that repeat an earlier one of the run."""
    prompt_words: int
    max_tokens: int
    seed: int

    def requests(self) -> Iterator[Ask]:
        """Yield requests without end."""
        draw = np.random.default_rng(self.seed)
        images = self._images(draw)
        while True:
            text = " ".join(draw.choice(WORDS, self.prompt_words))
            chosen = [next(images) for _ in range(self.images_per_request)]
            yield Ask(text, chosen, self.max_tokens)

    def _images(self, draw: np.random.Generator) -> Iterator[bytes]:
        new = pictures(draw, self.width, self.height, self.kind)
        held: list[bytes] = []
        while True:
            if held and draw.random() < self.same_share:
                yield held[draw.integers(len(held))]
                continue
            held = [*held[-HELD_IMAGES + 1 :], next(new)] if self.same_share else [next(new)]
            yield held[-1]
