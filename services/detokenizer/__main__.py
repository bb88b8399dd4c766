"""Token ids to text, incrementally, with stop strings."""

import threading

from common.checkpoint import open_checkpoint
from common.logs import get_logger
from common.member import Member
from common.process import run
from common.settings import DetokenizerSettings
from services.detokenizer.incremental import Vocabulary
from services.detokenizer.worker import Answer, Key, Worker


def main(settings: DetokenizerSettings, stop: threading.Event) -> None:
    checkpoint = open_checkpoint(settings.model)
    answers: dict[Key, Answer] = {}
    member = Member(settings, "detokenizer", stop, lambda: (len(answers), 0), checkpoint.fingerprint)
    vocabulary = Vocabulary(checkpoint.path / "tokenizer.json")
    get_logger().info("ready", id=member.id)
    member.ready()
    Worker(member, vocabulary, answers).run()
    member.close()


if __name__ == "__main__":
    run("detokenizer", __doc__ or "", main)
