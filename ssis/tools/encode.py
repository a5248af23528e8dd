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

from tqdm import tqdm

from ssis import UserError, config, distributed, sam
from ssis.datasets import parts
from ssis.io import program
from ssis.io.embeddings import Embeddings


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
    entry, count = segmenter.entry_bytes, sum(map(len, sets))
    limit = settings.sam_cache_gb
    if count * entry > 1e9 * limit:
        enough = math.ceil(count * entry / 1e9)
        raise UserError(f"--sam-cache-gb {limit:g}: too small; give {enough}")
    if rank == 0:
        each, needed = f"{entry / 1e6:.2g} MB each", f"{count * entry / 1e9:.1f} GB"
        print(f"{count:,} images, {each}, {needed} in {settings.sam_cache}")
    made = 0
    for images in sets:
        # Nothing in memory; the whole limit for each process, which has its part of the
        # images.
        cache = Embeddings(segmenter, images, settings.sam_cache, limit, 0.0)
        for index in tqdm(range(rank, len(images), world_size), disable=rank > 0):
            cache.load(index)
            if cache.encoded and not cache.entry(index).exists():
                raise UserError(
                    f"--sam-cache {settings.sam_cache}: full, what there is stays; "
                    "give another --sam-cache-gb, or a disk with more room"
                )
        made += cache.encoded
    # Each for itself: the others may need hours more.
    who = f"process {rank}: " if world_size > 1 else ""
    print(f"{who}{made:,} encoded, the others were there")
    distributed.stop()


def main(argv: list[str] | None = None) -> None:
    """`run`, with one line and status 2 for what the user did wrong."""
    program.run(run, argv)
