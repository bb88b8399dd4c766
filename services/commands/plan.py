"""`twinlens plan`: what a model takes of memory, and how many vision replicas keep a language group
busy."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

from common.checkpoint import BadCheckpoint, open_checkpoint
from common.config import BadSetting
from common.families.family import TP_SIZES
from common.settings import PlanSettings
from common.sizing import ITEM_BYTES, Footprint, cache_bytes
from services.commands.generate import ClientError
from services.commands.stage_times import StageTimes, measure

EXIT_USAGE = 2
EXIT_FAILED = 1
COLUMN = 12


def plan(settings: PlanSettings) -> int:
    """Prints the plan; gives the exit status."""
    try:
        for line in lines(settings):
            print(line, flush=True)
    except (BadCheckpoint, BadSetting) as e:
        print(f"twinlens plan: {e}", file=sys.stderr)
        return EXIT_USAGE
    except ClientError as e:
        print(f"twinlens plan: {e}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def lines(settings: PlanSettings) -> Iterator[str]:
    check(settings)
    checkpoint = open_checkpoint(settings.model)
    dtype = checkpoint.dtype if settings.dtype == "auto" else settings.dtype
    sizes = Footprint(checkpoint, ITEM_BYTES[dtype])
    context = settings.max_model_len or checkpoint.max_model_len
    yield (f"{checkpoint.name} ({checkpoint.family.title}) in {dtype}, {context} tokens of context")
    yield (
        f"a vision replica: {size(sizes.vision_bytes)} of weights; beside them the "
        "activations of one image"
    )
    yield ""
    yield from table(sizes, settings.card_gib, context)
    yield ""
    yield from replicas(settings, sizes)


def check(settings: PlanSettings) -> None:
    if (
        settings.images_per_request <= 0
        or settings.card_gib < 0
        or settings.concurrency < 1
        or settings.max_tokens < 1
    ):
        raise BadSetting(
            "--images-per-request, --concurrency and --max-tokens are numbers above 0, --card-gib "
            "is one from 0 on"
        )
    if settings.image and not Path(settings.image).is_file():
        raise BadSetting(f"--image {settings.image}: no such file")
    if bool(settings.vision_seconds) != bool(settings.group_rate):
        raise BadSetting(
            "--vision-seconds and --group-rate belong together: seconds of an image, and requests "
            "a second of a group"
        )


def table(sizes: Footprint, card_gib: float, context: int) -> Iterator[str]:
    """A line for each number of ranks."""
    head = ["tp", "weights/rank", "KV/token/rank", "whole context"]
    yield row([*head, f"tokens in {card_gib:g} GiB"] if card_gib else head)
    for world_size in TP_SIZES:
        if not sizes.checkpoint.sizes.fits(world_size):
            yield row([str(world_size), "does not divide this model"])
            continue
        weights = sizes.rank_bytes(world_size)
        per_token = sizes.kv_bytes_per_token(world_size)
        cells = [str(world_size), size(weights), size(per_token), size(per_token * context)]
        tokens = cache_bytes(int(card_gib * 2**30), weights) // per_token
        yield row(
            [*cells, f"{tokens}" if tokens >= context else f"{tokens}, too few"]
            if card_gib
            else cells
        )


def replicas(settings: PlanSettings, sizes: Footprint) -> Iterator[str]:
    """How many vision replicas do as much as one language group, by times that are measured or
    given."""
    if settings.image:
        image_token_id = sizes.checkpoint.family.placeholder_id(sizes.checkpoint)
        times = measure(
            settings.grpc,
            Path(settings.image),
            settings.max_tokens,
            settings.concurrency,
            image_token_id,
        )
        yield (
            f"measured at {settings.grpc}, {settings.concurrency} requests at once, "
            f"{settings.max_tokens} tokens each:"
        )
        yield (
            f"  preprocess {times.preprocess_seconds * 1000:.0f} ms a request, one "
            f"process does {1 / times.preprocess_seconds:.1f} a second"
        )
    elif settings.vision_seconds:
        times = StageTimes(0.0, settings.vision_seconds, settings.group_rate)
        yield "by the times given:"
    else:
        yield (
            "vision replicas for each language group: give --image FILE to measure a "
            "running system's stages (--grpc), or give"
        )
        yield "--vision-seconds and --group-rate"
        return
    busy = times.group_rate * settings.images_per_request * times.vision_seconds
    yield (
        f"  vision {times.vision_seconds * 1000:.0f} ms an image, one replica does "
        f"{1 / times.vision_seconds:.1f} a second"
    )
    yield (
        f"  a language group answers {times.group_rate:.2f} requests a second, "
        f"{settings.images_per_request:g} images each"
    )
    yield (
        f"  it keeps {busy:.2f} vision replicas busy: {max(1, math.ceil(busy))} for "
        "each language group"
    )


def row(cells: list[str]) -> str:
    return "  ".join([cells[0].rjust(2), *(cell.rjust(COLUMN) for cell in cells[1:])])


def size(num_bytes: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes:.0f} B"
