"""A vision encoder replica: one image at a time through the vision tower, embeddings straight to the language group."""

import threading
from collections import OrderedDict

import torch

from common.checkpoint import open_checkpoint
from common.device import prepare
from common.logs import get_logger
from common.member import Member
from common.process import run
from common.settings import VisionSettings
from services.vision.cache import EmbeddingCache
from services.vision.families.qwen2_5_vl import VisionTower
from services.vision.worker import Job, Key, Worker


def main(settings: VisionSettings, stop: threading.Event) -> None:
    checkpoint = open_checkpoint(settings.model)
    device, dtype = prepare(settings, checkpoint)
    jobs: OrderedDict[Key, Job] = OrderedDict()
    member = Member(settings, "vision", stop, lambda: load_of(jobs), checkpoint.fingerprint)
    log = get_logger()
    log.info("loading", id=member.id, model=str(checkpoint.path), dtype=str(dtype), device=str(device), threads=torch.get_num_threads())
    tower = VisionTower(checkpoint, dtype, device, member.loading)
    log.info("ready", id=member.id)
    member.ready()
    Worker(member, tower, EmbeddingCache(settings.embedding_cache_mib << 20), jobs).run()
    member.close()


def load_of(jobs: OrderedDict[Key, Job]) -> tuple[int, int]:
    """Called by another thread: a copy, because the work loop changes it."""
    granted = [job.granted for job in jobs.copy().values()]
    return sum(granted), len(granted) - sum(granted)


if __name__ == "__main__":
    run("vision", __doc__ or "", main)
