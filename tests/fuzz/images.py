"""Broken image files in the sandboxes of preprocess, which are real processes."""

import time
from random import Random

from services.preprocess.sandbox.jobs import Prepared, Refused
from tests.fuzz.apis import LEAKS
from tests.fuzz.bodies import image_file, small_images
from tests.fuzz.rounds import Result, num_descriptors
from tests.security.test_sandbox import Running, preparing

CODES = ("UnreadableImage", "TooLarge", "InvalidRequest")
INNOCENT_EVERY = 100
"""How many broken files there are for each whole one, whose preparation is compared."""


class Images:
    """Has files prepared, and counts what came of them."""

    def __init__(self, seed: str) -> None:
        self._draw = Random(seed)
        self.result = Result()

    def run(self, count: int) -> Result:
        began = time.perf_counter()
        running = Running()
        try:
            expected = running.do(preparing(small_images()[0])).items[0].mm_hash
            descriptors = num_descriptors()
            for number in range(count):
                self._prepare(running, image_file(self._draw))
                if number % INNOCENT_EVERY == 0:
                    self._check_innocent(running, expected)
            if (now := num_descriptors()) > descriptors:
                self.result.faults.append(f"{now} descriptors, {descriptors} before")
        finally:
            running.sandboxes.close()
        self.result.seconds = time.perf_counter() - began
        return self.result

    def _prepare(self, running: Running, file: bytes) -> None:
        result = running.do(preparing(file))
        match result:
            case Prepared():
                self.result.counts["prepared"] += 1
            case Refused(code=code, message=message):
                self.result.counts[code] += 1
                if code not in CODES or LEAKS.search(message.encode()):
                    self.result.faults.append(f"{code} {message} for {file.hex()}")
            case _:
                self.result.faults.append(f"{result} for {file.hex()}")

    def _check_innocent(self, running: Running, expected: str) -> None:
        result = running.do(preparing(small_images()[0]))
        if not isinstance(result, Prepared) or result.items[0].mm_hash != expected:
            self.result.faults.append(f"a whole image became {result}")
