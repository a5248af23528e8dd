r"""The training, validation and test part of a run: which files, and reading them.

Read next: `ssis/datasets/coco_json.py`, which reads one.
"""

import os
from pathlib import Path

from ssis import UserError
from ssis.datasets import copies, shapes, signs
from ssis.datasets.coco_json import add_folder, load_coco
from ssis.datasets.dataset import Dataset


# Largest training part whose images are looked for in the others.
SEARCHED = 20_000


def part_paths(config, part: str) -> tuple[str, str]:
    """JSON and image folder of "train", "val" or "test".

    A flag names them (`--train-json`), or the preset's folder `data` holds
    `instances_<part>.json` beside `<part>/`, or beside one folder `images/` for all. A
    dataset without a test part is tested on its validation part.

    Raises:
        UserError: only one of the two flags, no file for a part that must be there, or
            a test JSON that is missing.
    """
    source, folder = getattr(config, f"{part}_json"), getattr(config, f"{part}_images")
    if bool(source) != bool(folder):
        raise UserError(
            f"--{part}-json and --{part}-images go together: give both, or neither"
        )
    if not source and config.data and (part != "test" or not config.val_json):
        source, folder = f"{config.data}/instances_{part}.json", f"{config.data}/{part}"
        if not os.path.isdir(folder) and os.path.isdir(f"{config.data}/images"):
            folder = f"{config.data}/images"
    if part == "test" and not os.path.exists(source):
        if source and source == config.test_json:
            raise UserError(f"{source}: COCO JSON not found")
        return part_paths(config, "val")
    if not source:
        raise UserError(
            f"--{part}-json J --{part}-images D: needed with --preset {config.preset}"
        )
    return source, folder


def prepare(config) -> None:
    """Once, before all else: draw a built-in dataset, check every image file."""
    drawn = {"shapes": shapes.SHAPES, "signs": signs.SIGNS}
    if config.preset in drawn and not config.train_json:
        shapes.make(Path(config.data), scenes=drawn[config.preset])
    for part in open_parts(config):
        part.check_files()


def open_parts(config) -> tuple[Dataset, Dataset, Dataset]:
    """Training, validation and test datasets, with the training set's classes."""
    train_set = load_coco(*part_paths(config, "train"))
    val, test = (
        load_coco(*part_paths(config, part), train_set.names)
        for part in ("val", "test")
    )
    # Of an export that came already split.
    inside = [train_set.path(i) for i in range(len(train_set))]
    for judged in {part.source: part for part in (val, test)}.values():
        outside = [judged.path(i) for i in range(len(judged))]
        if same := copies.versions(inside, outside):
            train_set.warnings.append(
                f"{train_set.source}: {len(same)} images are versions of images in "
                f"{judged.source}, {train_set.files[min(same)]} is the first: a model "
                "is judged by what it was taught; export all images in one part, and "
                "let prepare own divide them"
            )
        # The makers of large datasets keep their parts apart.
        known = copies.Known(outside if len(inside) <= SEARCHED else [])
        both = [k for k, path in enumerate(inside) if k not in same and path in known]
        if both:
            train_set.warnings.append(
                f"{train_set.source}: {len(both)} images are in {judged.source} as "
                f"well, {train_set.files[both[0]]} is the first: a model is judged by "
                "what it was taught; take them out of one of the two"
            )
    if config.unlabeled_images:
        add_folder(train_set, config.unlabeled_images, apart=(val, test))
    return train_set, val, test
