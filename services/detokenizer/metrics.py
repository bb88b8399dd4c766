"""The metrics of a detokenizer."""

from common.metrics import StageMetrics


class DetokenizerMetrics(StageMetrics):
    """Two sums, which the work loop adds to and a scrape reads.

    A token takes about ten microseconds, so there is no histogram of their times.
    """

    def __init__(self) -> None:
        super().__init__("detokenizer")
        self.num_tokens = 0
        self.busy_seconds = 0.0
        self.total("tokens", "Tokens that were turned into text.", lambda: self.num_tokens)
        self.total(
            "busy_seconds",
            "Seconds in which tokens were turned into text.",
            lambda: self.busy_seconds,
        )
