"""The run of `twinlens verify`: what it opens, what it prints, and its verdict."""

import argparse
import math
from typing import Any

from common.checkpoint import open_checkpoint
from services.commands.client import ClientError
from services.commands.output import json_line
from services.commands.verification.comparison import BOUNDS, VECTOR_BOUNDS
from services.commands.verification.families import load
from services.commands.verification.findings import Plan, findings
from services.commands.verification.memory import GIB, check_memory
from services.commands.verification.questions import read_image
from services.commands.verification.reference import PixelLimits
from services.commands.verification.report import HEADINGS, ROW, Finding
from services.commands.verification.served import System
from services.commands.verification.weights import Float32Weights


def print_findings(arguments: argparse.Namespace) -> bool:
    """Print a row for each question, and a verdict. Return whether all are within the bounds.

    Raises BadCheckpoint or ClientError if a question cannot be asked or compared.
    """
    plan = plan_of(arguments)
    needed = Float32Weights(plan.checkpoint).bytes_needed
    print(
        f"{plan.system.url} serves {plan.system.name!r}; the reference of "
        f"{plan.checkpoint.path} needs {needed / GIB:.1f} GiB of memory here",
        flush=True,
    )
    check_memory(needed)
    reference = load(plan.checkpoint, plan.limits)
    print(f"reference: {reference.title}, in float32", flush=True)
    found = []
    print(ROW.format(*HEADINGS), flush=True)
    try:
        for finding in findings(plan, reference):
            found.append(finding)
            print(finding.row(), flush=True)
    finally:  # what differs matters even if a later question is not answered
        for finding in found:
            if finding.note:
                print(f"{finding.question}: {finding.note}")
    print(verdict(plan, found), flush=True)
    if arguments.json:
        print(json_line(summary(plan, reference.title, found)))
    return all(finding.is_within for finding in found)


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Return what to compare. Raises BadCheckpoint or ClientError."""
    checkpoint = open_checkpoint(arguments.model)
    if checkpoint.sizes.only_world_size:
        raise ClientError(f"{arguments.model} holds cut weights: give the file that was cut")
    images = [read_image(path) for path in arguments.image]
    embeds = checkpoint.family.tasks_of(checkpoint)[0] == "embed"
    bounds = VECTOR_BOUNDS if embeds else BOUNDS
    dtype = checkpoint.dtype if arguments.dtype == "auto" else arguments.dtype
    return Plan(
        checkpoint=checkpoint,
        system=System(arguments.url, arguments.served_model_name),
        images=images,
        limits=PixelLimits(arguments.min_pixels, arguments.max_pixels),
        max_tokens=arguments.max_tokens,
        dtype=dtype,
        tolerance=arguments.tolerance or bounds.get(dtype, bounds["bfloat16"]),
    )


def verdict(plan: Plan, found: list[Finding]) -> str:
    """Return one line: whether all is well, or what kind of thing is not."""
    bound = f"{plan.tolerance:g}, the bound for {plan.dtype}"
    wrong = [finding for finding in found if not finding.is_within]
    if not wrong:
        return f"OK: all {len(found)} questions are answered within {bound}"
    line = f"DIFFERS in {len(wrong)} of {len(found)} questions"
    if any(finding.prompt == "differs" for finding in wrong):
        return (
            f"{line}: the prompts are others. Does {plan.system.name!r} serve "
            f"{plan.checkpoint.path}, and with these limits of pixels (--min-pixels, --max-pixels)?"
        )
    return f"{line}: outside {bound} (--dtype, --tolerance)"


def summary(plan: Plan, reference: str, found: list[Finding]) -> dict[str, Any]:
    """Return the JSON object of a run."""
    compared = [finding.comparison for finding in found if finding.comparison]
    # A server may say no log-probabilities of some answers.
    differences = [c.max_difference for c in compared if not math.isnan(c.max_difference)]
    return {
        "is_within": all(finding.is_within for finding in found),
        "max_difference": max(differences, default=None),
        "agreement": min((c.agreement for c in compared), default=None),
        "tolerance": plan.tolerance,
        "dtype": plan.dtype,
        "model": str(plan.checkpoint.path),
        "reference": reference,
        "served_model": plan.system.name,
        "url": plan.system.url,
        "questions": [finding.fields() for finding in found],
    }
