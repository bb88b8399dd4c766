"""`python -m services.llm.shard`: cuts a model's weights into a file for each rank.

The files are those of the published two-chip cut: `part_model/RANK/cut_VQA_weights.pt` holds the
rank's rows or columns of the tensors that ranks share, and the others whole.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch

from common.checkpoint import BadCheckpoint, Checkpoint, open_checkpoint
from common.config import BadSetting, check_values, from_namespace
from common.config import add_arguments as add_setting_arguments
from common.model_files import check_place
from common.process import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from common.settings import ShardSettings
from compute.weights import DTYPES, Weights
from services.llm import families
from services.llm.parallel import Shard

CPU = torch.device("cpu")


def main() -> int:
    """Cut the weights, and return the exit status."""
    parser = argparse.ArgumentParser("twinlens shard", allow_abbrev=False)
    add_setting_arguments(ShardSettings, parser)
    settings = from_namespace(ShardSettings, parser.parse_args())
    try:
        check_values(settings)
        write_parts(open_checkpoint(settings.model), settings.tp, Path(settings.out).expanduser())
    except (BadCheckpoint, BadSetting) as e:
        print(f"twinlens shard: {e}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as e:
        print(f"twinlens shard: {e.filename or settings.out}: {e.strerror}", file=sys.stderr)
        return EXIT_FAILED
    print(f"{settings.out}: serve it with --tp {settings.tp}")
    return EXIT_OK


def write_parts(checkpoint: Checkpoint, world_size: int, out: Path) -> None:
    """Write a model directory with the weights cut for `world_size` ranks into a new folder.

    Raises
    ------
    BadCheckpoint
        if the family's weights are not cut, or not for this number of ranks, or `out` exists.
    """
    family = checkpoint.family
    if family.model_type not in families.PIECES:
        raise BadCheckpoint(
            f"{family.title} need not be cut: each rank reads its part of the model directory"
        )
    if out.exists():
        raise BadCheckpoint(f"{out} exists and is not overwritten: give --out a new folder")
    if checkpoint.sizes.only_world_size:
        raise BadCheckpoint(f"{checkpoint.path} has been cut already: cut the file it was made of")
    checkpoint.sizes.check_fits(world_size)
    pieces_of = families.PIECES[family.model_type]
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for rank, file in enumerate(family.part_files(unfinished, world_size)):
        file.parent.mkdir(parents=True)
        torch.save(part_of(checkpoint, pieces_of, Shard(rank, world_size)), file)
    for name in (*checkpoint.required_files, *family.optional_files, "config.json"):
        if (source := checkpoint.path / name).exists():
            check_place(checkpoint.path, source)
            shutil.copyfile(source, unfinished / name)
    unfinished.rename(out)


def part_of(
    checkpoint: Checkpoint, pieces_of: families.Pieces, shard: Shard
) -> dict[str, torch.Tensor]:
    """Return a rank's part of each tensor in floating point, of the dtype in which it is stored."""
    weights = Weights(checkpoint)
    found = {}
    for name, info in checkpoint.stored_tensors.items():
        if info.dtype not in DTYPES:
            continue  # an index, which follows from the sizes
        dtype = DTYPES[info.dtype]
        pieces = pieces_of(name, info.shape, shard)
        read = [weights.slice(name, info.shape, *piece, dtype, CPU) for piece in pieces]
        found[name] = (
            torch.cat(read, pieces[0][0]) if read else weights.tensor(name, info.shape, dtype, CPU)
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
