"""`twinlens serve --vision 1 --llm 1` on one card: the two share it as separate processes."""

from benchmarks.gpu.part import Task
from benchmarks.gpu.served import measure
from benchmarks.gpu.setup import Setup

TABLE = "Serving on one card"
SYSTEM = "separate processes"


def run(task: Task) -> None:
    measure(task, str(Setup(task).checkpoint().path), TABLE, SYSTEM)
