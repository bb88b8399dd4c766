"""A vision encoder replica: one image at a time through the vision tower, embeddings straight to the language group."""

import threading
from collections import OrderedDict

from common.checkpoint import Checkpoint, open_checkpoint
from common.logs import get_logger
from common.member import Member
from common.process import run
from common.settings import VisionSettings
from services.vision.cache import EmbeddingCache
from services.vision.worker import Job, Key, Tower, Worker


def main(settings: VisionSettings, stop: threading.Event) -> None:
    checkpoint = open_checkpoint(settings.model)
    jobs: OrderedDict[Key, Job] = OrderedDict()
    member = Member(settings, "vision", stop, lambda: load_of(jobs), checkpoint.fingerprint)
    tower = make_tower(settings, checkpoint, member)
    get_logger().info("ready", id=member.id)
    member.ready()
    Worker(member, tower, EmbeddingCache(settings.embedding_cache_mib << 20), jobs).run()
    member.close()


def make_tower(settings: VisionSettings, checkpoint: Checkpoint, member: Member) -> Tower:
    """torch is imported only where it is needed: many simulated replicas fit on a small machine."""
    if settings.simulate_vision_ms is not None:
        from services.vision.simulated import SimulatedTower

        get_logger().warning("simulated: the embeddings are noise", id=member.id, milliseconds=settings.simulate_vision_ms)
        return SimulatedTower(checkpoint, settings.simulate_vision_ms / 1000)
    from services.vision.torch_tower import TorchTower

    return TorchTower(settings, checkpoint, member)


def load_of(jobs: OrderedDict[Key, Job]) -> tuple[int, int]:
    """Called by another thread: a copy, because the work loop changes it."""
    granted = [job.granted for job in jobs.copy().values()]
    return sum(granted), len(granted) - sum(granted)


if __name__ == "__main__":
    run("vision", __doc__ or "", main)
