"""Turns token ids into text while they arrive, and finds stop strings."""

from common.checkpoint import open_checkpoint
from common.logs import get_logger
from common.member import Member, Profile
from common.messages import DetokenizerInbound
from common.process import Stop, run
from common.settings import DetokenizerSettings
from common.vocabulary import open_vocabulary
from services.detokenizer.metrics import DetokenizerMetrics
from services.detokenizer.worker import Worker


def main(settings: DetokenizerSettings, stop: Stop) -> None:
    checkpoint = open_checkpoint(settings.model)
    checkpoint.check_stage("detokenizer")
    metrics = DetokenizerMetrics()
    member: Member[DetokenizerInbound] = Member(
        settings,
        stop,
        Profile(role="detokenizer", fingerprint=checkpoint.fingerprint),
        drains=True,
        registry=metrics.registry,
    )
    worker = Worker(
        member,
        open_vocabulary(checkpoint),
        checkpoint.sizes.vocab_size,
        checkpoint.max_model_len,
        checkpoint.family.answers_hold_boxes,
        metrics,
    )
    get_logger().info("ready", id=member.id)
    member.ready()
    worker.run()
    member.close()


if __name__ == "__main__":
    run("detokenizer", __doc__ or "", main)
