"""The policy that adds and removes vision replicas by the expected queueing delay.

It has no clock of its own: each sample carries its time.
"""

import re
from collections import deque
from dataclasses import dataclass

from common.config import BadSetting
from common.errors import shorten
from common.settings import MAX_REPLICAS

HIGH_DELAY_SECONDS = 1.0
LOW_DELAY_SECONDS = 0.2
UP_SECONDS = 2.0
"""How long the delay must stay high: one large request alone is not a reason to grow."""
DOWN_SECONDS = 60.0
"""How long fewer replicas must have been enough."""
MAX_BUSY_SHARE = 0.7
"""The load that the remaining replicas may have; with more, the delay would soon be high again."""


@dataclass(frozen=True)
class Bounds:
    least: int
    most: int

    def __str__(self) -> str:
        return f"{self.least}:{self.most}"


@dataclass(frozen=True)
class Sample:
    """The vision pool at one moment.

    `delay` is the seconds until a new image would be started; `busy`, `ready` and `wanted` count
    replicas.
    """

    now: float
    delay: float
    busy: int
    ready: int
    wanted: int


class Autoscaler:
    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self._samples: deque[Sample] = deque()

    def recommend(self, sample: Sample) -> int:
        """Return how many replicas should run from now on.

        That is twice as many if images have to wait and no replica is still loading, or one fewer
        if that would have been enough for a minute.
        """
        if self._samples and sample.wanted != self._samples[-1].wanted:
            self._samples.clear()  # samples of another pool size say nothing about this one
        self._samples.append(sample)
        while self._samples[0].now < sample.now - DOWN_SECONDS:
            self._samples.popleft()
        wanted = sample.wanted
        if self._should_grow():
            wanted = 2 * wanted
        elif self._can_shrink():
            wanted -= 1
        return min(max(wanted, self.bounds.least), self.bounds.most)

    def _should_grow(self) -> bool:
        latest = self._samples[-1]
        recent = [s for s in self._samples if s.now >= latest.now - UP_SECONDS]
        covers_window = latest.now - self._samples[0].now >= UP_SECONDS
        return (
            covers_window
            and latest.ready >= latest.wanted
            and all(s.delay > HIGH_DELAY_SECONDS for s in recent)
        )

    def _can_shrink(self) -> bool:
        latest = self._samples[-1]
        oldest = self._samples[0]
        mean_busy = sum(s.busy for s in self._samples) / len(self._samples)
        covers_window = latest.now - oldest.now >= DOWN_SECONDS * 0.98
        return (
            covers_window
            and all(s.delay < LOW_DELAY_SECONDS for s in self._samples)
            and mean_busy <= MAX_BUSY_SHARE * (latest.wanted - 1)
        )


def parse_bounds(text: str) -> Bounds:
    """Return the bounds in a text of the form vision=LEAST:MOST.

    Raises
    ------
    BadSetting
        If the text has another form, or MOST is less than LEAST.
    """
    found = re.fullmatch(r"vision=([0-9]{1,3}):([0-9]{1,3})", text)
    if not found:
        raise BadSetting(
            f"--autoscale {shorten(text)}: write vision=LEAST:MOST, such as vision=1:4; only "
            "vision can be autoscaled"
        )
    bounds = Bounds(int(found[1]), int(found[2]))
    if not 1 <= bounds.least <= bounds.most <= MAX_REPLICAS:
        raise BadSetting(
            f"--autoscale {text}: LEAST must be at least 1, and MOST from LEAST to {MAX_REPLICAS}"
        )
    return bounds
