"""The language group: continuous batching over a paged KV cache, one process a tensor-parallel
rank."""

from common.tuning import apply_tuning

if __name__ == "__main__":
    apply_tuning("llm")  # first, because the libraries read it when they are imported

from common.checkpoint import open_checkpoint
from common.process import Stop, run
from common.settings import LlmSettings
from services.llm.grouping import other_ranks, resolve_rank


def main(settings: LlmSettings, stop: Stop) -> None:
    from services.llm.startup import check_settings, run_rank  # torch, which --help does not need

    if stop.is_set():  # a signal came during these imports, which take seconds
        return
    settings = resolve_rank(settings)
    checkpoint = open_checkpoint(settings.model, settings.embeddings)
    check_settings(settings, checkpoint)
    with other_ranks(settings) as settings:
        member = run_rank(settings, checkpoint, stop)
        stop.set()  # from here on the end of another rank is not a loss
    member.close()


if __name__ == "__main__":
    run("llm", __doc__ or "", main)
