r"""The labeled/unlabeled split: drawn once, written down, given back.

Semi-supervised learning is one decision about data: which images keep their masks. It
is made once, from the seed, before training starts, and written to `labeled.json`. If
every process drew its own, an image could be labeled in one and unlabeled in another.

Read next: `ssis/engine/loader.py`, which serves both parts.
"""

import hashlib
import json
import os
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from ssis import UserError, distributed
from ssis.datasets.coco_json import load_json
from ssis.datasets.copies import is_version, version_of
from ssis.datasets.dataset import Dataset
from ssis.io.files import write_text, writing


# Validation images below which what is measured on them is half chance.
FEW = 20
# What makes two names mirror images of each other, as expressions.
SIDES = (
    ("left", "right"),
    (r"\bl\b", "r"),
    (r"\blh\b", "rh"),
    (r"\bclockwise", "counterclockwise"),
    ("links", "rechts"),
    ("gauche", "droite"),
    ("izquierda", "derecha"),
)


def draw_split(
    dataset: Dataset, labeled: str, seed: int, pool: list[int] | None = None
) -> tuple[list[int], list[str]]:
    """Choose the labeled images.

    Args:
        dataset: the training images; the first `dataset.annotated` have masks.
        labeled: "5%" of the images, "64" images (or a few more, where versions of a
            photo stay together), "annotated" for those that have an annotation, or the
            path of a split's JSON.
        seed: of the draw; not used for the last two.
        pool: the images to draw a share or a number from; None: all that have masks.

    Returns:
        Sorted indices of the labeled images, and warnings.

    Raises:
        UserError: nothing to choose, too many, or a split that names unknown images.
    """
    # Images of a bare folder have no masks to be labeled with.
    total = dataset.annotated
    if labeled.endswith(".json"):
        given = read_split(dataset, labeled)
        return given, coverage(dataset, given)
    if labeled == "annotated":
        given = [i for i in range(total) if dataset.first[i] < dataset.first[i + 1]]
        return given, coverage(dataset, given)
    pool = list(range(total)) if pool is None else pool
    count = how_many(labeled, len(pool))
    generator = torch.Generator().manual_seed(seed)
    order = [pool[k] for k in torch.randperm(len(pool), generator=generator).tolist()]
    # Cover the classes first, the rarest first, each by the first image of the random
    # order that has it: a class without one labeled instance can never be learned.
    holders: dict[int, list[int]] = {}
    for index in order:
        for label in dataset.present_labels(index):
            holders.setdefault(label, []).append(index)
    versions = together(dataset, order)
    chosen: set[int] = set()
    for label in sorted(holders, key=lambda label: (len(holders[label]), label)):
        if len(chosen) < count and not chosen & set(holders[label]):
            chosen.update(versions[holders[label][0]])
    # The rest of the budget is uniform.
    for index in order:
        if len(chosen) < count:
            chosen.update(versions[index])
    return sorted(chosen), coverage(dataset, list(chosen))


def together(dataset: Dataset, order: list[int]) -> dict[int, list[int]]:
    """For each image those that are drawn with it: itself, or all versions of a photo.

    If one of Roboflow's augmented versions is labeled, the others are no unlabeled
    images any more.
    """
    names = [dataset.files[index] for index in order]
    photos = map(version_of, names) if any(map(is_version, names)) else order
    of_photo: dict = {}
    for index, photo in zip(order, photos, strict=True):
        of_photo.setdefault(photo, []).append(index)
    return {index: versions for versions in of_photo.values() for index in versions}


def how_many(labeled: str, total: int) -> int:
    """The number of images that "5%" or "64" means, of `total` images.

    Raises:
        UserError: neither a fraction nor a number; no image, or more than there are.
    """
    try:
        fraction = float(labeled[:-1]) / 100 if labeled.endswith("%") else None
        count = round(fraction * total) if fraction is not None else int(labeled)
    except (ValueError, OverflowError) as error:
        raise UserError(
            f"--labeled {labeled}: must be a share (5%), a number of images (64), "
            "annotated or the path of a split's .json"
        ) from error
    if not 1 <= count <= total:
        raise UserError(
            f"--labeled {labeled}: that is {count} of {total} images; "
            f"choose from 1 to {total}"
        )
    return count


def coverage(dataset: Dataset, chosen: list[int]) -> list[str]:
    """Warnings about classes that a split leaves without a labeled instance.

    Raises:
        UserError: no class has one.
    """
    covered = set().union(*(dataset.present_labels(index) for index in chosen))
    if not covered:
        raise UserError(
            f"{dataset.source}: the {len(chosen)} labeled images have no instance at "
            "all; label more images, or annotate some"
        )
    missing = [name for k, name in enumerate(dataset.names, 1) if k not in covered]
    if not missing:
        return []
    shown = ", ".join(missing[:8]) + (" …" if len(missing) > 8 else "")
    return [
        f"{len(missing)} of {len(dataset.names)} classes have no labeled instance and "
        f"cannot be learned: {shown}"
    ]


def judging(dataset: Dataset, counts: Tensor) -> list[str]:
    """Warnings about validation images that cannot judge all that is learned.

    Args:
        dataset: the validation part.
        counts: (C,) labeled instances of each class.

    Raises:
        UserError: no validation image has an instance.
    """
    there = dataset.class_counts(range(len(dataset)))
    if not there.sum():
        raise UserError(
            f"{dataset.source}: no image has an annotated instance, so no model can be "
            "judged by it; annotate some, or give another --val-json"
        )
    lines = []
    unseen = [
        name
        for name, n, v in zip(dataset.names, counts, there, strict=True)
        if n and not v
    ]
    if unseen:
        shown = ", ".join(unseen[:8]) + (" …" if len(unseen) > 8 else "")
        lines.append(
            f"no validation image has {shown}: neither AP nor the choice of best.pt "
            "knows of it"
        )
    if len(dataset) < FEW:
        lines.append(
            f"{dataset.source}: {len(dataset)} validation images are few; what is "
            f"measured on them is half chance below some {FEW}"
        )
    return lines


def mirrored(names: list[str]) -> list[str]:
    """A warning if some classes are others' mirror images: left hand and right hand."""
    plain = [" ".join(re.findall(r"[^\W_]+", name.lower())) for name in names]
    pairs = [
        f"{names[k]} / {names[plain.index(other)]}"
        for one, two in SIDES
        for k, name in enumerate(plain)
        if (other := re.sub(one, two, name)) != name and other in plain
    ]
    if not pairs:
        return []
    return [
        f"classes that differ in left and right ({', '.join(pairs[:3])}): a mirrored "
        "view has the wrong label; give --no-flip"
    ]


def fingerprint(dataset: Dataset) -> str:
    """A checksum of what a split is drawn from: the annotated images' names, in order.

    Images of a bare folder do not count: they can come and go.
    """
    names = "\n".join(dataset.files[: dataset.annotated]).encode()
    return hashlib.sha256(names).hexdigest()


def write_split(
    dataset: Dataset, indices: list[int], path: Path, seed: int | None, source: str = ""
) -> None:
    """Write `labeled.json`, which `--labeled` reads again.

    Args:
        dataset: the training images.
        indices: the labeled ones.
        path: the file, which is written whole or not at all.
        seed: of the draw; None for a published split.
        source: the file that it was published in.
    """
    content = dict(
        source=os.path.basename(dataset.source),
        seed=seed,
        **(dict(published=source) if source else {}),
        of=dataset.annotated,
        sha256=fingerprint(dataset),
        labeled=[dataset.files[index] for index in indices],
    )
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_text(path, text + "\n")


def read_split(dataset: Dataset, path: str) -> list[int]:
    """Indices of the images that a split names; a list, or a dict with `labeled`.

    A split of another list of images is used, with a warning, as long as it names only
    images that are there: it is no longer the fraction that it was.

    Raises:
        UserError: not a split, or it names an image that the dataset does not list.
    """
    raw = load_json(path, "split")
    names = raw.get("labeled") if isinstance(raw, dict) else raw
    if not isinstance(names, list) or not names:
        raise UserError(
            f"{path}: not a split: it must be a list of file names, or "
            '{"labeled": [...]}'
        )
    position = {dataset.files[index]: index for index in range(dataset.annotated)}
    unknown = [
        name for name in names if not isinstance(name, str) or name not in position
    ]
    if unknown:
        raise UserError(
            f"{path}: names {len(unknown)} images that {dataset.source} does not "
            f"list, the first is {unknown[0]!r}"
        )
    if isinstance(raw, dict) and raw.get("sha256", fingerprint(dataset)) != fingerprint(
        dataset
    ):
        print(
            f"warning: {path}: was drawn from other images than {dataset.source} has "
            f"({raw.get('of')}, not {dataset.annotated}; the checksums differ)",
            file=sys.stderr,
        )
    return sorted({position[name] for name in names})


def split(train_set: Dataset, config, path: Path) -> tuple[list[int], list[int]]:
    """Labeled and unlabeled images of a run: as written in its folder, or drawn now.

    Only the main process draws and writes; the others are sent the result.

    Args:
        train_set: the training images.
        config: the settings; `labeled`, `seed`, `unlabeled_includes_labeled` and
            `method` are used.
        path: `labeled.json` in the run's folder.

    Returns:
        Sorted indices of the labeled and of the unlabeled images.

    Raises:
        UserError: the images are not those that the split was drawn from, or none is
            left unlabeled for a method that needs some.
    """

    def draw() -> list[int]:
        # A resumed run keeps its split; the images must be those it was drawn from.
        if path.exists() and load_json(str(path), "split").get("sha256") != fingerprint(
            train_set
        ):
            raise UserError(
                f"{path}: the training images in {train_set.source} are others than "
                "when this run began; give another --output"
            )
        if not path.exists():
            chosen, warnings = draw_split(train_set, config.labeled, config.seed)
            if config.flip:
                warnings += mirrored(train_set.names)
            for line in train_set.warnings + warnings:
                print(f"warning: {line}", file=sys.stderr)
            with writing(path):
                write_split(train_set, chosen, path, config.seed)
        return read_split(train_set, str(path))

    labeled = distributed.from_main(draw)
    hidden = set(labeled)
    unlabeled = [
        i
        for i in range(len(train_set))
        if config.unlabeled_includes_labeled or i not in hidden
    ]
    if not unlabeled and config.method != "supervised":
        raise UserError(
            f"--labeled {config.labeled}: no unlabeled image is left for --method "
            f"{config.method}; label fewer, or give --unlabeled-images"
        )
    return labeled, unlabeled
