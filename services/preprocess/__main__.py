"""Chat template, tokenizer, images to patches, positions; chooses the language group and each
image's vision replica."""

from common.checkpoint import open_checkpoint
from common.config import BadSetting
from common.logs import get_logger
from common.member import Member, Profile
from common.messages import PreprocessInbound
from common.process import Stop, run
from common.settings import PreprocessSettings
from services.preprocess.families.qwen2_5_vl import Preprocessor
from services.preprocess.metrics import PreprocessMetrics
from services.preprocess.vision_pool import VisionPool
from services.preprocess.worker import Worker


def main(settings: PreprocessSettings, stop: Stop) -> None:
    checkpoint = open_checkpoint(settings.model)
    resizes = settings.oversized_images == "resize"
    try:
        preprocessor = Preprocessor(
            checkpoint, settings.min_pixels, settings.max_pixels, settings.max_model_len, resizes
        )
    except ValueError as e:
        raise BadSetting(str(e)) from e
    pool = VisionPool()
    metrics = PreprocessMetrics(pool)
    member: Member[PreprocessInbound] = Member(
        settings,
        stop,
        Profile(
            role="preprocess",
            fingerprint=checkpoint.fingerprint,
            peers=checkpoint.family.needed_roles,
        ),
        drains=True,
        registry=metrics.registry,
    )
    worker = Worker(member, preprocessor, pool, metrics)
    get_logger().info("waiting for a vision replica and a language group", id=member.id)
    worker.run()
    member.close()


if __name__ == "__main__":
    run("preprocess", __doc__ or "", main)
