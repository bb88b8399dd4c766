"""The tasks of `twinlens eval`."""

from services.commands.evaluation.cer import CER
from services.commands.evaluation.clip_score import CLIP_SCORE
from services.commands.evaluation.mmbench import MMBENCH
from services.commands.evaluation.mmmu import MMMU
from services.commands.evaluation.ocrbench import OCRBENCH
from services.commands.evaluation.olmocr_bench import OLMOCR_BENCH
from services.commands.evaluation.textvqa import TEXTVQA
from services.commands.evaluation.vqav2 import VQAV2

TASKS = {
    task.name: task
    for task in (TEXTVQA, OCRBENCH, VQAV2, CLIP_SCORE, MMBENCH, MMMU, CER, OLMOCR_BENCH)
}
