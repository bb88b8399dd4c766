"""Token ids to text, incrementally, with stop strings."""

from common.checkpoint import open_checkpoint
from common.logs import get_logger
from common.member import Member
from common.process import Stop, run
from common.settings import DetokenizerSettings
from services.detokenizer.incremental import Vocabulary
from services.detokenizer.worker import Answer, Key, Worker


def main(settings: DetokenizerSettings, stop: Stop) -> None:
    checkpoint = open_checkpoint(settings.model)
    answers: dict[Key, Answer] = {}
    awaited: set[str] = set()
    member = Member(
        settings,
        "detokenizer",
        stop,
        lambda: (len(answers), len(awaited)),
        checkpoint.fingerprint,
        drains=True,
    )
    vocabulary = Vocabulary(checkpoint.path / "tokenizer.json")
    get_logger().info("ready", id=member.id)
    member.ready()
    Worker(member, vocabulary, answers, awaited).run()
    member.close()


if __name__ == "__main__":
    run("detokenizer", __doc__ or "", main)
