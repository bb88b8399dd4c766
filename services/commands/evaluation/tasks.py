"""The tasks of `twinlens eval`."""

from services.commands.evaluation.cer import CER
from services.commands.evaluation.ocrbench import OCRBENCH

TASKS = {task.name: task for task in (OCRBENCH, CER)}
