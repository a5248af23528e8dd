r"""SAM's embeddings of a dataset, made ahead of the training runs that need them.

    torchrun --nproc_per_node 8 -m ssis sam encode FLAGS     with the flags of train.py
    python -m ssis sam encode --preset coco --method s4m --sam-cache embeddings
        --sam-cache-gb 250 --sam-checkpoint sam_vit_h_4b8939.pth

Encoding an image takes SAM longer than a training step takes all the rest, and its
result never changes. A run makes the embeddings as it meets the images, and keeps what
there is room for; this command makes all of them once, on all processes, in the order
of the dataset. The same command goes on where an earlier call was stopped.

Read next: `ssis/sam.py`, whose cache it fills.
"""

import math
import shutil
from pathlib import Path

from tqdm import tqdm

from ssis import UserError, config, distributed, sam
from ssis.datasets import parts


def run(argv: list[str] | None) -> None:
    """The command line.

    Raises:
        UserError: no SAM, no folder, or not enough room in it.
    """
    if {"-h", "--help"} & set(argv or ()):
        print(f"usage: python -m ssis sam encode FLAGS\n\n{__doc__}")
        return
    settings = config.parse(argv)
    if not settings.uses_sam or not settings.sam_cache:
        raise UserError(
            "sam encode: give the flags of the run, a --method that asks SAM (s4m or "
            "full), and --sam-cache FOLDER"
        )
    rank, world_size, device = distributed.start(settings.device)
    distributed.from_main(parts.prepare, settings)
    train_set, val_set, _ = parts.open_parts(settings)
    segmenter = sam.SegmentAnything(settings.sam, settings.sam_checkpoint, device)
    # The calibration asks SAM about the validation images too.
    sets = [train_set, val_set] if settings.filter == "calibrated" else [train_set]
    limits = (settings.sam_cache, settings.sam_cache_gb, 0.0, world_size)
    caches = [sam.Embeddings(segmenter, each, *limits) for each in sets]
    needed = sum(map(len, sets)) * segmenter.entry_bytes
    distributed.from_main(check_room, needed, settings.sam_cache, settings.sam_cache_gb)
    if rank == 0:
        each = f"{segmenter.entry_bytes / 1e6:.2g} MB each"
        print(
            f"{sum(map(len, sets)):,} images, {each}, {needed / 1e9:.1f} GB in "
            f"{settings.sam_cache}"
        )
    for cache, images in zip(caches, sets, strict=True):
        for index in tqdm(range(rank, len(images), world_size), disable=rank > 0):
            cache.load(index)
    made = sum(sum(part) for part in distributed.gather([c.encoded for c in caches]))
    if rank == 0:
        print(f"{made:,} encoded, the others were there")
    distributed.stop()


def check_room(needed: int, folder: str, limit_gb: float) -> None:
    """Refuse what would not fit, before hours of work.

    Args:
        needed: bytes of all embeddings.
        folder: of the cache.
        limit_gb: of the cache, 10^9 bytes.

    Raises:
        UserError: the limit, or the disk, is too small.
    """
    enough = math.ceil(needed / 1e9)
    if needed > 1e9 * limit_gb:
        raise UserError(f"--sam-cache-gb {limit_gb:g}: {enough} are needed")
    there = sum(f.stat().st_size for f in Path(folder).glob("*.sam"))
    free = shutil.disk_usage(folder).free
    if needed - there > free:
        raise UserError(
            f"--sam-cache {folder}: {enough} GB are needed, {free / 1e9:.0f} are free "
            "on this disk; choose another"
        )


def main(argv: list[str] | None = None) -> None:
    """`run`, with one line and status 2 for what the user did wrong."""
    distributed.program(run, argv)
