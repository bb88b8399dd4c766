"""Chat template, tokenizer, images to patches, positions; chooses the language group and each
image's vision replica."""

from collections import OrderedDict

from common.checkpoint import open_checkpoint
from common.config import BadSetting
from common.logs import get_logger
from common.member import Member
from common.process import Stop, run
from common.settings import PreprocessSettings
from services.preprocess.families.qwen2_5_vl import Preprocessor
from services.preprocess.in_flight import Handover, Key, Preparation
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
    preparations: OrderedDict[Key, Preparation] = OrderedDict()
    handovers: dict[Key, Handover] = {}
    pool = VisionPool()
    metrics = PreprocessMetrics(pool)
    load = lambda: (len(handovers), len(preparations))  # noqa: E731
    member = Member(
        settings,
        "preprocess",
        stop,
        load,
        checkpoint.fingerprint,
        peers=("vision", "llm"),
        drains=True,
        registry=metrics.registry,
    )
    get_logger().info("waiting for a vision replica and a language group", id=member.id)
    Worker(member, preprocessor, preparations, handovers, pool, metrics).run()
    member.close()


if __name__ == "__main__":
    run("preprocess", __doc__ or "", main)
