"""The language group: continuous batching over a paged KV cache, one process a tensor-parallel
rank."""

from common.checkpoint import open_checkpoint
from common.process import Stop, run
from common.settings import LlmSettings
from services.llm.grouping import other_ranks, resolve_rank
from services.llm.startup import check_settings, run_rank


def main(settings: LlmSettings, stop: Stop) -> None:
    settings = resolve_rank(settings)
    checkpoint = open_checkpoint(settings.model)
    check_settings(settings, checkpoint)
    with other_ranks(settings) as settings:
        member = run_rank(settings, checkpoint, stop)
        stop.set()  # from here on the end of another rank is not a loss
    member.close()


if __name__ == "__main__":
    run("llm", __doc__ or "", main)
