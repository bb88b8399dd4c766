"""Parts of the work of a run, each for one process."""

from tests.fuzz import clock  # noqa: F401  it must come before the services
from tests.fuzz.apis import Bodies
from tests.fuzz.controller import ControllerTarget
from tests.fuzz.detokenizer import DetokenizerTarget
from tests.fuzz.gateway import GatewayTarget, GroupsTarget
from tests.fuzz.images import Images
from tests.fuzz.llm import LlmTarget
from tests.fuzz.preprocess import GatewaysTarget, PreprocessTarget
from tests.fuzz.processes import Processes
from tests.fuzz.rank import RankTarget
from tests.fuzz.rounds import Result, Rounds, quiet
from tests.fuzz.targets import Target
from tests.fuzz.vision import VisionTarget

TARGETS: dict[str, type[Target]] = {
    "gateway": GatewayTarget,
    "gateway from groups": GroupsTarget,
    "preprocess": PreprocessTarget,
    "preprocess from gateways": GatewaysTarget,
    "vision": VisionTarget,
    "llm": LlmTarget,
    "rank": RankTarget,
    "detokenizer": DetokenizerTarget,
    "controller": ControllerTarget,
}
BODIES = "bodies"
IMAGES = "images"
PROCESSES = "processes"

Job = tuple[str, str, int]
"""(target, BODIES, IMAGES or PROCESSES; seed; number of messages, bodies or files)."""


def run(job: Job) -> tuple[Job, Result]:
    """Do a part of the work, and return what it found."""
    name, seed, count = job
    with quiet() as log:
        match name:
            case "bodies":
                result = Bodies(seed).run(count)
            case "images":
                result = Images(seed).run(count)
            case "processes":
                result = Processes(seed).run(count)
            case _:
                result = Rounds(TARGETS[name], seed).run(count)
    result.unforeseen = log.counts
    return job, result
