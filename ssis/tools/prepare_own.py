r"""Your own data: one COCO JSON, checked and divided into training and validation.

    python -m ssis prepare own --json export.json --root photos --out data/own
        --json A B             several: what was corrected later beside the first
        --val 20%              of the images, or their number, to judge by
        --match-names          find each image by the last part of its name
        --group-by REGEX       what names of copies have in common
        --masks-from-boxes P   boxes alone: let SAM, with the weights P, draw the masks

*Groups.* Copies of one picture stay on one side: otherwise the model is judged on what
it has been taught. `ssis/datasets/copies.py` defines what counts as a copy;
`--group-by` replaces it by an expression of one's own, and `"(.*)"` makes each image
its own group.

*A second round.* Images that an earlier call put into the validation part stay there,
also as new versions of the same photos.

Read next: `ssis/datasets/copies.py`.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

import torch

from ssis import UserError
from ssis.datasets import coco_json, copies, file_names, split
from ssis.datasets.dataset import Dataset
from ssis.io.sam_weights import CHECKPOINTS
from ssis.tools import masks_from_boxes

# Flags that need --json.
FLAGS = ("match_names", "group_by", "masks_from_boxes")
# The largest fraction of the images that a group of more than three may have, unless
# --group-by made it.
LARGEST = 0.2


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `own`."""
    own = parser.add_argument_group("own")
    own.add_argument(
        "--json", nargs="+", default=[], help="the COCO JSON of your annotation tool"
    )
    own.add_argument("--val", default="20%", help="percentage or number of images")
    own.add_argument(
        "--match-names", action="store_true", help="by the last part of a file_name"
    )
    own.add_argument("--group-by", default="", metavar="REGEX", help="copies, by name")
    own.add_argument("--masks-from-boxes", metavar="PATH", help="weights of a SAM")
    own.add_argument("--sam", default="vit_b", choices=("tiny", *CHECKPOINTS))


def joined(paths: list[str]) -> dict:
    """The content of a JSON, or of several in one.

    A class is the same where its name is. Ids of later JSONs get a number in front:
    each tool counts from 1.

    Raises:
        UserError: one of them is not COCO format.
    """
    whole = coco_json.load_raw(paths[0])
    for number, path in enumerate(paths[1:], 2):
        more = coco_json.load_raw(path)
        try:
            known, new = {c["name"]: c["id"] for c in whole["categories"]}, {}
            for record in more["categories"]:
                if record["name"] not in known:
                    known[record["name"]] = f"{number}/{record['id']}"
                    whole["categories"].append(dict(record, id=known[record["name"]]))
                new[coco_json.as_number(record["id"])] = known[record["name"]]
            for record in more["images"]:
                whole["images"].append(dict(record, id=f"{number}/{record['id']}"))
            for record in more["annotations"]:
                ids = {key: f"{number}/{record[key]}" for key in ("id", "image_id")}
                ids["category_id"] = new[coco_json.as_number(record["category_id"])]
                whole["annotations"].append(dict(record, **ids))
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not COCO format: a record has no proper {error}"
            ) from error
    return whole


def divide(args: argparse.Namespace, out: Path) -> dict[str, dict]:
    """The content of the two JSONs.

    Args:
        args: `json`, `root`, `val` (as `--labeled`: 20% or 6) and those of `FLAGS`.
        out: the folder that they will be written to, where an earlier call may have
            left others.

    Returns:
        "train" and "val", each with its COCO JSON.

    Raises:
        UserError: the amount leaves no training image, no image can be spared, or most
            images are of one group.
    """
    source, raw = " + ".join(args.json), joined(args.json)
    if args.match_names:
        changed = file_names.match(raw["images"], args.root, source)
        print(
            f"{changed} of {len(raw['images'])} images found by the last part of a name"
            + (", the others by their names" if changed < len(raw["images"]) else "")
        )
    # Until SAM has drawn them, boxes stand for masks: all else is checked first.
    boxes = masks_from_boxes.outlined(raw, source) if args.masks_from_boxes else []
    dataset = coco_json.read(raw, source, str(args.root), None)
    name, beside = dataset.files[0], Path(args.json[0]).parent
    if not (args.root / name).exists() and (beside / name).exists():
        raise UserError(
            f"{name}: not in {args.root}, but beside {source}; give --root {beside}, "
            "or --match-names if others are in it"
        )
    dataset.check_files()
    try:
        count = split.how_many(args.val, len(dataset))
    except UserError as error:
        raise UserError(str(error).replace("--labeled", "--val")) from error
    if count == len(dataset):
        raise UserError(f"--val {args.val}: leaves no image to train on")
    earlier = set()
    if (out / "instances_val.json").exists():
        before = coco_json.load_json(str(out / "instances_val.json"), "COCO JSON")
        earlier = {copies.version_of(image["file_name"]) for image in before["images"]}
        gone = earlier - set(map(copies.version_of, dataset.files))
        if gone == earlier:
            raise UserError(
                f"{source}: has none of the images in {out}/instances_val.json, by "
                "which models have been judged; add them, or give another --out"
            )
        if gone:
            print(
                f"warning: {len(gone)} images of the earlier validation part are no "
                f"longer in {source}, {min(gone)} is the first",
                file=sys.stderr,
            )
    group = grouped(dataset, args.group_by, count)
    val = choose(dataset, group, count, earlier)
    if earlier and len(val) > count:
        print(
            f"--val {args.val}: the {len(val)} images that an earlier call chose stay"
        )
    if not earlier and len(val) < count:
        print(
            f"--val {args.val}: {len(val)} images; groups stay whole, and the last "
            "image of a class is one to train on"
        )
    if boxes:
        masks_from_boxes.draw(boxes, dataset, args, out)
        dataset = coco_json.read(raw, source, str(args.root), None)
    train = [i for i in range(len(dataset)) if i not in val]
    for line in (*dataset.warnings, *split.coverage(dataset, train)):
        print(f"warning: {line}", file=sys.stderr)
    if not val:
        least = min(Counter(group).values())
        raise UserError(
            f"{source}: no image can be used for validation: "
            + (
                f"the smallest group has {least} images; give --val {least}, or make "
                "smaller groups with --group-by"
                if least > count
                else "each is the last of some class; annotate more"
            )
        )
    # Without the category that a tool adds in front to stand for all the others.
    categories = [c for c in raw["categories"] if c["name"] in dataset.names]
    parts = {}
    for part in ("train", "val"):
        # The reader keeps the order of the JSON's images.
        images = [
            x for i, x in enumerate(raw["images"]) if (i in val) == (part == "val")
        ]
        ids = {coco_json.as_number(image["id"]) for image in images}
        rows = [
            a for a in raw["annotations"] if coco_json.as_number(a["image_id"]) in ids
        ]
        info = dict(description=f"ssis.prepare own {part}", group_by=args.group_by)
        lists = dict(images=images, annotations=rows, categories=categories)
        parts[part] = dict(raw, info=info, **lists)
    return parts


def grouped(dataset: Dataset, pattern: str, count: int) -> list[int]:
    """The group of each image, with a line for what was found.

    Args:
        dataset: all images.
        pattern: of `--group-by`.
        count: of the images to judge by; a group that is no larger fits among them.

    Raises:
        UserError: no such expression, or a group found by itself is too large to be on
            one side.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"--group-by {pattern}: not an expression ({error})") from error
    paths = [dataset.path(i) for i in range(len(dataset))]
    try:
        group = copies.groups(dataset.files, paths, pattern)
    except ImportError:
        print(
            "warning: without the package imagehash copies are told by their names "
            "alone; pip install imagehash",
            file=sys.stderr,
        )
        group = copies.groups(dataset.files, [], pattern)
    if pattern and not any(
        re.search(pattern, copies.version_of(name)) for name in dataset.files
    ):
        raise UserError(
            f"--group-by {pattern}: finds nothing in any of the {len(group)} names, "
            f"such as {copies.version_of(dataset.files[0])!r}"
        )
    sizes = Counter(group)
    first, largest = sizes.most_common(1)[0]
    # So many frames, in tens, hundreds or thousands, make a group that fits.
    digits = len(str(count)) - 1
    last = r"\d" * digits
    frames = f'"(.*){last}$" (each {10**digits} frames)'
    if largest > max(3, LARGEST * len(group)) and not pattern:
        raise UserError(
            f"{dataset.source}: {largest} of {len(group)} images are taken for "
            "versions of one picture or frames of one film "
            f"({dataset.files[first]} and others) "
            "and would all be on one side; say what belongs together: --group-by "
            f'{frames + " or " if digits else ""}"(.*)" (each image alone)'
        )
    several = [size for size in sizes.values() if size > 1]
    what = "by --group-by" if pattern else "versions of one picture or frames of a film"
    if several or pattern:
        print(
            f"{len(several)} groups of {sum(several)} images ({what}): each stays on "
            "one side"
        )
    elif (number := numbered(dataset.files)) and digits:
        print(
            f"note: {number} of {len(group)} names differ in a number alone, such as "
            f"{dataset.files[first]}: if they are frames of a film, give --group-by "
            f"{frames}, or neighbors are on both sides"
        )
    return group


def numbered(names: list[str]) -> int:
    """How many names are a number after the same words; 0 where not nearly all are."""
    words = Counter(re.sub(r"\d+$", "", copies.version_of(name)) for name in names)
    number = words.most_common(1)[0][1]
    return number if number > 0.8 * len(names) else 0


def choose(
    dataset: Dataset, group: list[int], count: int, earlier: set[str]
) -> set[int]:
    """The validation images: whole groups, drawn at random, the same in each call.

    The last image of a class stays in the training part.

    Args:
        dataset: all images.
        group: of each.
        count: how many are wanted; there are fewer where no group fits any more.
        earlier: `copies.version_of` those that an earlier call chose: otherwise a model
            trained before could be evaluated on images that it has seen.
    """
    members: dict[int, list[int]] = {}
    for index, number in enumerate(group):
        members.setdefault(number, []).append(index)
    val = {
        i
        for images in members.values()
        if any(copies.version_of(dataset.files[i]) in earlier for i in images)
        for i in images
    }
    # How many images of the training part have each class.
    labels = [dataset.present_labels(i) for i in range(len(dataset))]
    left = Counter(k for i, held in enumerate(labels) if i not in val for k in held)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    for index in order.tolist():
        images = members[group[index]]
        held = Counter(k for i in images for k in labels[i])
        if (
            index not in val
            and len(val) + len(images) <= count
            and all(left[label] > number for label, number in held.items())
        ):
            val.update(images)
            left.subtract(held)
    return val
