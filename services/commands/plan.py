"""`twinlens plan`: the memory that a model needs, and the vision replicas per language group."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

from common.checkpoint import BadCheckpoint, open_checkpoint
from common.config import BadSetting, check_values
from common.families.family import TP_SIZES
from common.process import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from common.settings import PlanSettings
from common.sizing import ITEM_BYTES, Footprint, cache_bytes
from services.commands.client import ClientError
from services.commands.stage_times import StageTimes, measure

COLUMN_WIDTH = 12
NO_FIT = "does not divide this model"


def plan(settings: PlanSettings) -> int:
    """Print the plan, and return the exit status."""
    try:
        for line in lines(settings):
            print(line, flush=True)
    except (BadCheckpoint, BadSetting) as e:
        print(f"twinlens plan: {e}", file=sys.stderr)
        return EXIT_USAGE
    except ClientError as e:
        print(f"twinlens plan: {e}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


def lines(settings: PlanSettings) -> Iterator[str]:
    """Yield the lines of the plan.

    Raises
    ------
    BadSetting, BadCheckpoint
        If a setting is wrong or the model cannot be served.
    ClientError
        If the stages should be measured and the running system does not answer.
    """
    check(settings)
    checkpoint = open_checkpoint(settings.model)
    dtype = checkpoint.dtype if settings.dtype == "auto" else settings.dtype
    if dtype not in ITEM_BYTES:
        raise BadSetting(
            f"--dtype auto: the model is in {dtype}; set one of {', '.join(ITEM_BYTES)}"
        )
    footprint = Footprint(checkpoint, ITEM_BYTES[dtype])
    context = settings.max_model_len or checkpoint.max_model_len
    kind = f"{dtype} with quantized weights" if footprint.is_quantized else dtype
    yield f"{checkpoint.name} ({checkpoint.family.title}) in {kind}, {context} tokens of context"
    has_tower = "vision" in checkpoint.family.needed_roles
    if has_tower:
        yield (
            f"a vision replica: {size(footprint.vision_bytes)} of weights, and the activations of "
            "one image"
        )
    else:
        yield "no vision replicas: the language group computes images and texts together"
    yield ""
    if checkpoint.sizes.num_kv_heads:
        yield from table(footprint, settings.card_gib, context)
    else:
        yield from table_without_cache(footprint, settings.card_gib)
    if has_tower:
        yield ""
        yield from replicas(settings, footprint)


def check(settings: PlanSettings) -> None:
    check_values(settings)
    if settings.image and not Path(settings.image).is_file():
        raise BadSetting(f"--image {settings.image}: no such file")
    if bool(settings.vision_seconds) != bool(settings.group_rate):
        raise BadSetting(
            "set both --vision-seconds (seconds per image) and --group-rate (requests per second "
            "of a language group), or neither"
        )


def table(footprint: Footprint, card_gib: float, context: int) -> Iterator[str]:
    """Yield a header and a line for each number of tensor-parallel ranks."""
    head = ["tp", "weights/rank", "KV/token/rank", "whole context"]
    yield row([*head, f"tokens in {card_gib:g} GiB"] if card_gib else head)
    for world_size in TP_SIZES:
        if not footprint.checkpoint.sizes.fits(world_size):
            yield row([str(world_size), NO_FIT])
            continue
        weights = footprint.rank_bytes(world_size)
        per_token = footprint.kv_bytes_per_token(world_size)
        cells = [str(world_size), size(weights), size(per_token), size(per_token * context)]
        tokens = cache_bytes(int(card_gib * 2**30), weights) // per_token
        yield row(
            [*cells, f"{tokens}" if tokens >= context else f"{tokens}, too few"]
            if card_gib
            else cells
        )


def table_without_cache(footprint: Footprint, card_gib: float) -> Iterator[str]:
    """Yield the same of a model that computes each request in one step and keeps nothing."""
    head = ["tp", "weights/rank", "KV/token/rank"]
    yield row([*head, f"left of {card_gib:g} GiB"] if card_gib else head)
    for world_size in TP_SIZES:
        if not footprint.checkpoint.sizes.fits(world_size):
            yield row([str(world_size), NO_FIT])
            continue
        weights = footprint.rank_bytes(world_size)
        left = card_gib * 2**30 - weights
        cells = [str(world_size), size(weights), "none"]
        yield row([*cells, size(left) if left > 0 else "too small"] if card_gib else cells)


def replicas(settings: PlanSettings, footprint: Footprint) -> Iterator[str]:
    """Yield how many vision replicas keep up with one language group.

    The stage times are measured, or those that the settings name.
    """
    if settings.image:
        image_token_id = footprint.checkpoint.family.placeholder_id(footprint.checkpoint)
        times = measure(
            settings.grpc,
            Path(settings.image),
            settings.max_tokens,
            settings.concurrency,
            image_token_id,
        )
        yield (
            f"measured at {settings.grpc}, {settings.concurrency} concurrent requests of "
            f"{settings.max_tokens} tokens each:"
        )
        yield (
            f"  preprocess {times.preprocess_seconds * 1000:.0f} ms a request: one process does "
            f"{1 / times.preprocess_seconds:.1f} a second"
        )
    elif settings.vision_seconds:
        times = StageTimes(0.0, settings.vision_seconds, settings.group_rate)
        yield "with the stage times given:"
    else:
        yield "To plan vision replicas, measure a running system's stages with --image FILE and"
        yield "--grpc HOST:PORT, or set --vision-seconds and --group-rate."
        return
    busy = times.group_rate * settings.images_per_request * times.vision_seconds
    yield (
        f"  vision {times.vision_seconds * 1000:.0f} ms an image: one replica does "
        f"{1 / times.vision_seconds:.1f} a second"
    )
    yield (
        f"  a language group answers {times.group_rate:.2f} requests a second, "
        f"{settings.images_per_request:g} images each"
    )
    yield (
        f"  it keeps {busy:.2f} vision replicas busy: {max(1, math.ceil(busy))} for each language "
        "group"
    )


def row(cells: list[str]) -> str:
    return "  ".join([cells[0].rjust(2), *(cell.rjust(COLUMN_WIDTH) for cell in cells[1:])])


def size(num_bytes: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes:.0f} B"
