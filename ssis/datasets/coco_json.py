r"""Reading COCO-format JSON: every record is checked, then packed into a `Dataset`.

The traps that real files hold are met here, once: ids that are given twice, have gaps,
start at 0 or are text; a category that stands for all the others; names that climb out
of the image folder; masks as polygons in several parts, as compressed and as
uncompressed RLE; crowds; annotations of nothing. Whatever cannot be right ends with one
line that names the file and the record.

Read next: `ssis/datasets/split.py`, which chooses the labeled images.
"""

import contextlib
import gc
import json
import os
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

from ssis import UserError
from ssis.datasets.copies import Known, leaks, versions
from ssis.datasets.dataset import Dataset
from ssis.datasets.file_names import images_under, safe_name
from ssis.datasets.masks import NOTES, read_mask
from ssis.io import images


def load_json(path: str, what: str):
    """Parsed JSON, or UserError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except FileNotFoundError as error:
        raise UserError(f"{path}: {what} not found") from error
    except OSError as error:
        raise UserError(f"{path}: {what} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {what} is not JSON ({error})") from error


def load_raw(path: str) -> dict:
    """A COCO JSON with its three lists, whose records are not checked; or UserError."""
    raw = load_json(path, "COCO JSON")
    keys = ("images", "annotations", "categories")
    if not isinstance(raw, dict) or not all(
        isinstance(raw.get(key), list) for key in keys
    ):
        raise UserError(
            f"{path}: not COCO format: it must have the lists {', '.join(keys)}"
        )
    return raw


def load_coco(path: str, folder: str, names: list[str] | None = None) -> Dataset:
    """Read a COCO-format JSON.

    Args:
        path: the JSON: `images`, `annotations`, `categories`; polygons or RLE.
        folder: the image folder.
        names: the class names to use, those of the training set, so that a label means
            the same class in every part; None takes the JSON's own.

    Raises:
        UserError: what is wrong in which record, one line.
    """
    with no_collection():
        return read(load_raw(path), path, folder, names)


@contextlib.contextmanager
def no_collection():
    """Without Python's search for reference cycles.

    Millions of new objects set it off again and again, and a JSON has no cycles: a
    third of the time of reading a large one (docs/performance.md).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read(raw: dict, path: str, folder: str, names: list[str] | None) -> Dataset:
    """The content of a JSON as a `Dataset`; arguments and errors as `load_coco`."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: image folder not found")
    for key in ("images", "annotations", "categories"):
        for number, record in enumerate(raw[key]):
            if not isinstance(record, dict):
                raise UserError(
                    f"{path}: not COCO format: {key}[{number}] is {record!r:.40}, no "
                    "record; remove it"
                )
    try:
        used = {as_number(record["category_id"]) for record in raw["annotations"]}
        categories = without_placeholder(raw["categories"], used, names)
        dataset, label_of = read_categories(categories, path, folder, names)
        position = read_images(raw["images"], dataset)
        read_annotations(raw["annotations"], dataset, label_of, position)
        if isinstance(info := raw.get("info"), dict):
            dataset.group_by = str(info.get("group_by", ""))
        return dataset
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        key = isinstance(error, KeyError)
        said = f"no proper {error}" if key else f"a value that cannot be read ({error})"
        raise UserError(f"{path}: not COCO format: a record has {said}") from error


def as_number(value) -> int | str:
    """An id or a size as a number: there are tools that write 7, "7" and 7.0."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isdecimal() and len(value) < 19:
        # Not "007": as text it is another id than "7".
        return int(value) if str(int(value)) == value else value
    return value


def without_placeholder(
    records: list[dict], used: set, names: list[str] | None
) -> list[dict]:
    """Categories without the one that Roboflow puts in front for the whole project.

    It is the supercategory of all the others and has none itself, nothing is annotated
    with it, and as a class it would have no AP.
    """
    for record in records:
        others = [other for other in records if other is not record]
        name = record["name"]
        if (
            others
            and all(other.get("supercategory") == name for other in others)
            and record.get("supercategory") in (None, "", "none")
            and as_number(record["id"]) not in used
            # A class of the training set stays one, unless it is there once more.
            and (name not in (names or []) or any(o["name"] == name for o in others))
        ):
            return others
    return records


def read_categories(
    records: list[dict], path: str, folder: str, names: list[str] | None
) -> tuple[Dataset, dict]:
    """An empty `Dataset` with its classes, and the label of each category id."""
    # Sorted by id: the order of a JSON's list is an accident, labels must not be.
    # Numbers come before text; the two cannot be compared.
    numbers = [as_number(category["id"]) for category in records]
    order = sorted(numbers, key=lambda number: (isinstance(number, str), number))
    records = [records[numbers.index(number)] for number in order]
    own, ids = [c["name"] for c in records], order
    if not own or len(set(own)) < len(own) or len(set(ids)) < len(ids):
        raise UserError(
            f"{path}: categories must be there, with ids and names given only once"
        )
    names = names or own
    unknown = sorted(set(own) - set(names))
    if unknown:
        raise UserError(
            f"{path}: unknown class {unknown[0]!r}; the model knows "
            f"{', '.join(names[:8])}{' …' if len(names) > 8 else ''}"
        )
    # As the file writes them: predictions are saved with them.
    written = {category["name"]: category["id"] for category in records}
    dataset = Dataset(path, folder, list(names), [written.get(name) for name in names])
    labels = [names.index(name) + 1 for name in own]
    return dataset, dict(zip(ids, labels, strict=True))


def read_images(records: list[dict], dataset: Dataset) -> dict:
    """Fill in names, ids and sizes; returns the position of each image id."""
    path, position, seen, sizes = dataset.source, {}, set(), []
    for image in records:
        number = as_number(image["id"])
        if number in position:
            raise UserError(
                f"{path}: two images have the id {image['id']}; make ids unique"
            )
        name = safe_name(image["file_name"], path)
        if name in seen:
            raise UserError(
                f"{path}: two images have the file_name {name!r}; the split could not "
                "tell them apart"
            )
        size = (as_number(image["height"]), as_number(image["width"]))
        if not all(isinstance(side, int) and 0 < side < 2**31 for side in size):
            raise UserError(
                f"{path}: image {name!r} has height {size[0]!r} and width {size[1]!r}; "
                "both must be whole numbers above 0"
            )
        position[number] = len(position)
        seen.add(name)
        sizes.append(size)
        dataset.files.append(name)
        dataset.image_ids.append(image["id"])
    if not position:
        raise UserError(f"{path}: lists no image")
    dataset.folders = [dataset.folder] * len(position)
    dataset.sizes = np.array(sizes, np.int64)
    dataset.annotated = len(position)
    return position


def read_annotations(
    records: list[dict], dataset: Dataset, label_of: dict, position: dict
) -> None:
    """Pack the annotations into the arrays that `Dataset` describes."""
    # Grouped by image; the order within an image is kept.
    rows = [[] for _ in position]
    for record in records:
        for key, known in (("image_id", position), ("category_id", label_of)):
            if as_number(record[key]) not in known:
                raise UserError(
                    f"{dataset.source}: annotation {record.get('id')} has {key} "
                    f"{record[key]}, which is not listed"
                )
        rows[position[as_number(record["image_id"])]].append(record)

    # Arrays that grow: millions of Python numbers would be gigabytes on their own.
    labels, crowd, polygonal = array("q"), array("b"), array("b")
    first, part_first, byte_first = (array("q", [0]) for _ in range(3))
    pieces, told = [], Counter()
    for image_records, size in zip(rows, dataset.sizes.tolist(), strict=True):
        seen = set()
        for record in image_records:
            parts, is_polygon = read_mask(record, size, dataset.source, told)
            label = label_of[as_number(record["category_id"])]
            if not parts:
                continue
            # Merged exports have some annotations twice.
            crowded = bool(record.get("iscrowd", 0))
            if (content := (label, crowded, *parts)) in seen:
                told["twice"] += 1
                continue
            seen.add(content)
            labels.append(label)
            crowd.append(crowded)
            polygonal.append(is_polygon)
            for part in parts:
                pieces.append(part)
                byte_first.append(byte_first[-1] + len(part))
            part_first.append(part_first[-1] + len(parts))
        first.append(len(labels))
    if records and not (labels or told["fractions"]):
        raise UserError(
            f"{dataset.source}: none of its {len(records)} annotations has a mask; "
            "export polygons or RLE (instance segmentation, not object detection), or "
            "let SAM draw masks in the boxes: python -m ssis prepare own "
            "--masks-from-boxes"
        )
    if told["fractions"] and not any(polygonal):
        raise UserError(
            f"{dataset.source}: all polygons lie between 0 and 1, as fractions of the "
            "image; COCO's are in pixels: multiply x by the width and y by the height"
        )
    dataset.warnings += [
        f"{dataset.source}: {told[key]} annotations {text}"
        for key, text in NOTES.items()
        if told[key]
    ]
    dataset.labels = np.array(labels, np.int64)
    dataset.crowd, dataset.polygonal = np.array(crowd, bool), np.array(polygonal, bool)
    dataset.first, dataset.part_first = np.array(first), np.array(part_first)
    dataset.byte_first = np.array(byte_first)
    dataset.bytes = np.frombuffer(b"".join(pieces), np.uint8)


def add_folder(dataset: Dataset, folder: str, apart: tuple = ()) -> list[int]:
    """Append the images of a bare folder; returns their indices.

    They have no annotations and never will: sizes are left unknown. Files that the
    dataset lists already, or of which it lists versions (Roboflow's), are passed over,
    since the labeled and the unlabeled images often share a folder; so are those of the
    datasets in `apart`, on which the model is to be judged and which it must not have
    seen, even without labels. Their copies count too, also versions of them and
    pictures compressed anew (`copies.leaks`).

    Raises:
        UserError: no such folder, or no image in it.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: folder of unlabeled images not found")
    root = Path(folder)
    names = images_under(root)
    judged = [part.path(i) for part in apart for i in range(len(part))]
    listed = [dataset.path(i) for i in range(len(dataset))]
    known = Known([*judged, *listed])
    names = [name for name in names if str(root / name) not in known]
    same = versions([str(root / name) for name in names], listed)
    if same:
        dataset.warnings.append(
            f"{folder}: {len(same)} images are versions of images in {dataset.source} "
            f"and are left out, {names[min(same)]} is the first"
        )
    names = [name for k, name in enumerate(names) if k not in same]
    pattern = max((part.group_by for part in apart), default="")
    found, warnings = leaks([str(root / name) for name in names], judged, pattern)
    mend = ""
    if len(found - versions([str(root / n) for n in names], judged)) > 0.2 * len(names):
        mend = (
            "; if they are other pictures, of one scene, prepare the annotated ones "
            'with --group-by "(.*)": then looks do not count'
        )
    if found:
        dataset.warnings.append(
            f"{folder}: {len(found)} images are versions or copies of validation or "
            f"test images and are left out, {names[min(found)]} is the first{mend}"
        )
    dataset.warnings += warnings if judged else []
    names = [name for k, name in enumerate(names) if k not in found]
    if not names:
        raise UserError(
            f"{folder}: no new image in it ({', '.join(images.IMAGE_TYPES)}); those of "
            f"{dataset.source} and copies of validation or test images do not count"
            f"{mend}"
        )
    start = len(dataset)
    dataset.files += names
    dataset.folders += [folder] * len(names)
    # No id in the JSON: the name serves.
    dataset.image_ids += names
    dataset.sizes = np.concatenate([dataset.sizes, np.zeros((len(names), 2), np.int64)])
    dataset.first = np.concatenate(
        [dataset.first, np.full(len(names), dataset.first[-1])]
    )
    return list(range(start, len(dataset)))
