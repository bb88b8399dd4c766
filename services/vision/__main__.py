"""A vision replica: encodes one item at a time and sends embeddings to the language group."""

from common.tuning import apply_tuning

if __name__ == "__main__":
    apply_tuning("vision")  # first, because the libraries read it when they are imported

from common.buckets import parse_buckets
from common.checkpoint import Checkpoint, open_checkpoint
from common.logs import get_logger
from common.member import Member, Profile
from common.messages import VisionInbound
from common.metric_aliases import serve_aliases
from common.process import Stop, run
from common.progress import Progress
from common.settings import VisionSettings
from common.vision_artefact import VisionArtefact, check_artefact_settings, open_artefact
from services.vision.cache import EmbeddingCache
from services.vision.encode_times import EncodeTimes
from services.vision.item_rules import ItemRules
from services.vision.metrics import VisionMetrics
from services.vision.tower_thread import Tower, TowerThread
from services.vision.worker import Worker


def main(settings: VisionSettings, stop: Stop) -> None:
    artefact = open_given_artefact(settings)
    checkpoint = artefact.checkpoint if artefact else open_checkpoint(settings.model)
    checkpoint.check_stage("vision")
    buckets = (
        artefact.buckets
        if artefact
        else parse_buckets(settings.vision_buckets, checkpoint.patches_per_token)
    )
    cache = EmbeddingCache(settings.embedding_cache_mib << 20)
    metrics = VisionMetrics(cache)
    member: Member[VisionInbound] = Member(
        settings,
        stop,
        Profile(role="vision", fingerprint=checkpoint.fingerprint),
        drains=True,
        standby=settings.standby,
        registry=metrics.registry,
    )
    tower = make_tower(settings, checkpoint, member, buckets, artefact)
    progress = Progress()
    thread = TowerThread(tower, member.post, progress)
    member.progress.include(progress)
    rules = ItemRules.of(
        checkpoint,
        settings.min_pixels,
        settings.max_pixels,
        buckets,
        is_compiled=artefact is not None,
    )
    worker = Worker(member, thread, cache, tower.dtype, EncodeTimes(buckets), metrics, rules)
    serve_aliases(metrics, settings)
    get_logger().info("ready", id=member.id)
    member.ready()
    worker.run()
    member.close()


def open_given_artefact(settings: VisionSettings) -> VisionArtefact | None:
    """Return the artefact that the settings name. The model directory is not read then."""
    if not settings.vision_artefact:
        return None
    artefact = open_artefact(settings.vision_artefact)
    check_artefact_settings(artefact, vars(settings))
    return artefact


def make_tower(
    settings: VisionSettings,
    checkpoint: Checkpoint,
    member: Member[VisionInbound],
    buckets: tuple[int, ...],
    artefact: VisionArtefact | None,
) -> Tower:
    """Return the model's tower or a compiled one, or a simulated one if the settings ask for it.

    torch is imported only if needed, so that many simulated replicas fit on a small machine.
    """
    if settings.simulate_vision_ms is not None:
        from services.vision.simulated import SimulatedTower

        get_logger().warning(
            "simulated: the embeddings are noise",
            id=member.id,
            milliseconds=settings.simulate_vision_ms,
        )
        return SimulatedTower(checkpoint, settings.simulate_vision_ms / 1000, buckets)
    from services.vision.torch_tower import TorchTower

    return TorchTower(settings, checkpoint, member, buckets, artefact)


if __name__ == "__main__":
    run("vision", __doc__ or "", main)
