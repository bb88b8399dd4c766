"""Parts of the work of a run, each for one process."""

from tests.fuzz import clock  # noqa: F401  it must come before the services
from tests.fuzz.apis import Bodies
from tests.fuzz.controller import ControllerTarget
from tests.fuzz.detokenizer import DetokenizerTarget
from tests.fuzz.gateway import GatewayTarget
from tests.fuzz.llm import LlmTarget
from tests.fuzz.preprocess import PreprocessTarget
from tests.fuzz.rank import RankTarget
from tests.fuzz.rounds import Result, Rounds, quiet
from tests.fuzz.targets import Target
from tests.fuzz.vision import VisionTarget

TARGETS: dict[str, type[Target]] = {
    "gateway": GatewayTarget,
    "preprocess": PreprocessTarget,
    "vision": VisionTarget,
    "llm": LlmTarget,
    "rank": RankTarget,
    "detokenizer": DetokenizerTarget,
    "controller": ControllerTarget,
}
BODIES = "bodies"


Job = tuple[str, str, int]
"""(target or BODIES, seed, number of messages or bodies)."""


def run(job: Job) -> tuple[Job, Result]:
    name, seed, count = job
    with quiet() as log:
        if name == BODIES:
            result = Bodies(seed).run(count)
        else:
            result = Rounds(TARGETS[name], seed).run(count)
    result.unforeseen = log.counts
    return job, result
