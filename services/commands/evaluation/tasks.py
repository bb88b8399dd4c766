"""The tasks of `twinlens eval`."""

from services.commands.evaluation.cer import CER
from services.commands.evaluation.ocrbench import OCRBENCH
from services.commands.evaluation.olmocr_bench import OLMOCR_BENCH

TASKS = {task.name: task for task in (OCRBENCH, CER, OLMOCR_BENCH)}
