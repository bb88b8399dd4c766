"""Prepares prompts and images, and chooses a language group and vision replicas for them.

It applies the chat template, tokenizes, cuts images into patches and computes positions.
"""

from common.cgroup import num_cores
from common.checkpoint import open_checkpoint
from common.config import BadSetting
from common.logs import get_logger
from common.member import Member, Profile
from common.messages import PreprocessInbound
from common.metric_aliases import serve_aliases
from common.process import Stop, run
from common.settings import PreprocessSettings
from services.preprocess import families
from services.preprocess.families import ItemLimits
from services.preprocess.image_formats import formats_of
from services.preprocess.metrics import PreprocessMetrics
from services.preprocess.preprocessor import Preprocessor
from services.preprocess.sandbox.jobs import Setup
from services.preprocess.sandbox.pool import Sandboxes
from services.preprocess.vision_pool import VisionPool
from services.preprocess.worker import Worker


def main(settings: PreprocessSettings, stop: Stop) -> None:
    if settings.sandboxes < 0:
        raise BadSetting(f"sandboxes is {settings.sandboxes}: give 1 or more, or 0 for the default")
    checkpoint = open_checkpoint(settings.model)
    resizes = settings.oversized_images == "resize"
    limits = ItemLimits(settings.min_pixels, settings.max_pixels, resizes)
    try:
        rules = families.load(checkpoint, limits)
        video_rules = families.load_video(checkpoint, limits)
        preprocessor = Preprocessor(
            checkpoint, rules, settings.max_model_len, settings.known_as, video_rules
        )
    except ValueError as e:
        raise BadSetting(str(e)) from e
    setup = Setup(
        settings.model,
        preprocessor.max_model_len,
        settings.min_pixels,
        settings.max_pixels,
        resizes,
        settings.known_as,
        settings.video_fps,
        settings.max_frames,
        formats_of(settings.image_formats),
    )
    sandboxes = Sandboxes(setup, settings.sandboxes or num_cores())
    sandboxes.wait_until_loaded()
    pool = VisionPool()
    metrics = PreprocessMetrics(pool)
    serve_aliases(metrics, settings)
    member: Member[PreprocessInbound] = Member(
        settings,
        stop,
        Profile(
            role="preprocess",
            fingerprint=checkpoint.fingerprint,
            peers=checkpoint.family.needed_roles,
            tasks=checkpoint.family.tasks_of(checkpoint),
            stages=checkpoint.family.stages_of(checkpoint),
        ),
        drains=True,
        registry=metrics.registry,
    )
    sandboxes.begin(member.post)
    worker = Worker(member, preprocessor, sandboxes, pool, metrics)
    get_logger().info("waiting for a vision replica and a language group", id=member.id)
    worker.run()
    member.close()


if __name__ == "__main__":
    run("preprocess", __doc__ or "", main)
