"""When to add a vision replica and when to take one away: a policy on the expected queue delay,
without a clock of its own."""

import re
from collections import deque
from dataclasses import dataclass

from common.config import BadSetting

HIGH_DELAY_SECONDS = 1.0
LOW_DELAY_SECONDS = 0.2
UP_SECONDS = 2.0
"""For how long the delay must be high: one large request alone is no reason."""
DOWN_SECONDS = 60.0
"""For how long fewer replicas must have sufficed."""
MOST_BUSY_SHARE = 0.7
"""Of the replicas that would remain; with more the delay would soon be high again."""


@dataclass(frozen=True)
class Bounds:
    least: int
    most: int

    def __str__(self) -> str:
        return f"{self.least}:{self.most}"


@dataclass(frozen=True)
class Sample:
    """The pool at one moment: seconds until a new image would be begun, replicas at work, ready,
    and wanted."""

    now: float
    delay: float
    busy: int
    ready: int
    wanted: int


class Autoscaler:
    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self._samples: deque[Sample] = deque()

    def wanted(self, sample: Sample) -> int:
        """How many replicas there should be from now on: twice as many where images wait, while
        none is still on its way; one fewer where that would have sufficed for a minute."""
        if self._samples and sample.wanted != self._samples[-1].wanted:
            self._samples.clear()  # the past tells nothing of another number
        self._samples.append(sample)
        while self._samples[0].now < sample.now - DOWN_SECONDS:
            self._samples.popleft()
        wanted = sample.wanted
        if self._is_slow():
            wanted = 2 * wanted
        elif self._is_idle():
            wanted -= 1
        return min(max(wanted, self.bounds.least), self.bounds.most)

    def _is_slow(self) -> bool:
        latest = self._samples[-1]
        recent = [s for s in self._samples if s.now >= latest.now - UP_SECONDS]
        lasted = latest.now - self._samples[0].now >= UP_SECONDS
        return (
            lasted
            and latest.ready >= latest.wanted
            and all(s.delay > HIGH_DELAY_SECONDS for s in recent)
        )

    def _is_idle(self) -> bool:
        latest = self._samples[-1]
        oldest = self._samples[0]
        busy = sum(s.busy for s in self._samples) / len(self._samples)
        lasted = latest.now - oldest.now >= DOWN_SECONDS * 0.98
        return (
            lasted
            and all(s.delay < LOW_DELAY_SECONDS for s in self._samples)
            and busy <= MOST_BUSY_SHARE * (latest.wanted - 1)
        )


def parse_bounds(text: str) -> Bounds:
    """vision=LEAST:MOST.

    Raises
    ------
    BadSetting
    """
    found = re.fullmatch(r"vision=(\d{1,3}):(\d{1,3})", text)
    if not found:
        raise BadSetting(
            f"--autoscale {text}: give vision=LEAST:MOST, as in vision=1:4; other roles are not "
            "scaled by themselves"
        )
    bounds = Bounds(int(found[1]), int(found[2]))
    if not 1 <= bounds.least <= bounds.most:
        raise BadSetting(f"--autoscale {text}: LEAST is at least 1, and MOST no less")
    return bounds
