r"""COCO-format datasets, packed; labels, boxes and masks as the model wants them.

Two decisions are worth knowing:

* *Annotations are packed into a few numpy arrays.* A Python list of dicts is copied,
  page by page, into each loader worker, because reading an object writes its
  reference count; with COCO that is gigabytes per worker. Arrays are shared.
* *A box is the box of its mask.* The annotated boxes, areas and ids are not used: they
  are wrong often enough, and the mask says it all.

Contracts: labels are 1..C in the order of the category ids, which may have gaps or
start at 0; boxes xyxy, absolute pixels, float32, `x2 > x1`, `y2 > y1`.

Read next: `ssis/split.py`, which decides whose masks are hidden.
"""

import contextlib
import io
import json
import os
from array import array
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from torch import Tensor
from torchvision.ops import masks_to_boxes

from ssis import UserError, images


def boxes_of(masks: Tensor) -> Tensor:
    """Boxes (N, 4) float32 of masks (N, H, W), none of which may be empty.

    `masks_to_boxes` names the first and the last pixel; a box ends after its last
    pixel, and one that did not would be degenerate for a mask one pixel wide.
    """
    boxes = masks_to_boxes(masks)
    boxes[:, 2:] += 1
    return boxes.reshape(-1, 4).float()


def sanitize(target: dict) -> dict:
    """Drop instances without pixels and derive the boxes again; a new target.

    Called after everything that moves or hides pixels: torchvision's Mask R-CNN raises
    on a degenerate box, and a box that is looser than its mask teaches the wrong thing.
    """
    masks = target["masks"]
    keep = (masks != 0).flatten(1).any(dim=1)
    kept = {key: value[keep] for key, value in target.items() if key != "boxes"}
    return {**kept, "boxes": boxes_of(kept["masks"])}


class Dataset:
    """A COCO-format dataset: images, and their annotations packed into arrays.

    Attributes:
        source: path of the JSON (or folder), for messages.
        names: class names; `names[k - 1]` belongs to label k.
        category_ids: the dataset's own ids, in the same order.
        files: image names relative to `folder`, "/" between folders.
        folders: the folder of each image.
        image_ids: the dataset's own ids (any JSON value, kept for the predictions).
        sizes: (N, 2) int64 height and width; zeros where unknown (a bare folder).
        annotated: the truth is known of this many images, the first ones.
        warnings: lines about what was passed over while reading.
    """

    def __init__(self, source: str, folder: str, names: list[str], category_ids: list):
        self.source, self.names, self.category_ids = source, names, category_ids
        self.folder = folder
        self.files: list[str] = []
        self.folders: list[str] = []
        self.image_ids: list = []
        self.sizes = np.zeros((0, 2), np.int64)
        self.annotated = 0
        self.warnings: list[str] = []
        # Annotations of image i: rows first[i] to first[i + 1] of labels and crowd, and
        # of their parts (one RLE, or one polygon each): bytes in one long buffer.
        self.first = np.zeros(1, np.int64)
        self.labels = np.zeros(0, np.int64)
        self.crowd = np.zeros(0, bool)
        self.polygonal = np.zeros(0, bool)
        self.part_first = np.zeros(1, np.int64)
        self.byte_first = np.zeros(1, np.int64)
        self.bytes = np.zeros(0, np.uint8)

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        """The file of an image."""
        return os.path.join(self.folders[index], self.files[index])

    def image(self, index: int) -> Tensor:
        """The image, (3, H, W) uint8, in the original frame."""
        return images.read_image(self.path(index), self.size(index))

    def size(self, index: int) -> tuple[int, int] | None:
        """Height and width that the dataset says, or None in a bare folder."""
        return tuple(self.sizes[index].tolist()) if self.sizes[index].any() else None

    def rles(self, index: int) -> list[dict]:
        """The masks of an image as pycocotools' compressed RLEs, crowds included."""
        height, width = self.sizes[index].tolist()
        result = []
        for row in range(self.first[index], self.first[index + 1]):
            parts = [
                self.bytes[self.byte_first[k] : self.byte_first[k + 1]]
                for k in range(self.part_first[row], self.part_first[row + 1])
            ]
            if self.polygonal[row]:
                # An instance cut in two by an occluder has two polygons and one mask.
                polygons = [part.view(np.float64).tolist() for part in parts]
                result.append(
                    mask_utils.merge(mask_utils.frPyObjects(polygons, height, width))
                )
            else:
                result.append(dict(size=[height, width], counts=parts[0].tobytes()))
        return result

    def target(self, index: int) -> dict:
        """The truth of an image in the original frame: boxes, labels, masks.

        Crowds ("many people") are left out: they are no instances. What the background
        there teaches is wrong, as it is in torchvision's own training.
        """
        rows = slice(self.first[index], self.first[index + 1])
        single = ~self.crowd[rows]
        height, width = self.sizes[index].tolist()
        rles = [rle for rle, keep in zip(self.rles(index), single, strict=True) if keep]
        try:
            masks = mask_utils.decode(rles) if rles else np.zeros((height, width, 0))
        except ValueError as error:
            raise UserError(
                f"{self.source}: image {self.files[index]!r} has an RLE that cannot be "
                "read; correct or remove it"
            ) from error
        # A contiguous (N, H, W): pycocotools decodes into (H, W, N), columns first.
        masks = torch.from_numpy(
            np.ascontiguousarray(masks.transpose(2, 0, 1), np.uint8)
        )
        return sanitize(
            dict(labels=torch.from_numpy(self.labels[rows][single]), masks=masks)
        )

    def present_labels(self, index: int) -> set[int]:
        """The classes of which an image has an instance (crowds do not count)."""
        rows = slice(self.first[index], self.first[index + 1])
        return set(self.labels[rows][~self.crowd[rows]].tolist())

    def instances_per_image(self, indices: list[int]) -> float:
        """Mean number of instances of some images, the crowds left out."""
        singles = np.concatenate([[0], np.cumsum(~self.crowd)])
        counts = singles[self.first[1:]] - singles[self.first[:-1]]
        return float(counts[indices].mean()) if len(indices) else 0.0

    def coco(self, indices: list[int]) -> COCO:
        """The truth of some images as pycocotools' object, with labels as category ids.

        Image ids are the indices. Areas and boxes are computed from the masks: COCO's
        AP by size would repeat a wrong `area`.
        """
        records, annotations = [], []
        for index in indices:
            height, width = self.sizes[index].tolist()
            records.append(dict(id=int(index), height=height, width=width))
            for row, rle in enumerate(self.rles(index), self.first[index]):
                annotations.append(
                    # Ids from 1: pycocotools takes a match with id 0 for none.
                    dict(
                        id=len(annotations) + 1,
                        image_id=int(index),
                        segmentation=rle,
                        category_id=int(self.labels[row]),
                        iscrowd=int(self.crowd[row]),
                        area=float(mask_utils.area(rle)),
                        bbox=mask_utils.toBbox(rle).tolist(),
                    )
                )
        categories = [dict(id=k, name=name) for k, name in enumerate(self.names, 1)]
        coco = COCO()
        # `info` must be there: loadRes of some versions copies it without asking.
        coco.dataset = dict(
            info={}, images=records, annotations=annotations, categories=categories
        )
        # pycocotools prints as it indexes.
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def check_files(self) -> None:
        """Look at every image before the training starts, rather than hours into it.

        Up to 20,000 images their headers are read too, some 0.1 ms each, so that a
        wrong size is seen now; in a larger dataset it is seen at the image's turn.
        """
        for index in range(len(self)):
            path = self.path(index)
            if not os.path.isfile(path):
                raise UserError(
                    f"{path}: image not found, but listed in {self.source}; "
                    "is the image folder the right one?"
                )
            if len(self) <= 20_000:
                images.check_header(path, self.size(index))


def safe_name(name, source: str) -> str:
    """A file name from a JSON, or UserError when it leaves the image folder."""
    if not isinstance(name, str) or not name:
        raise UserError(f"{source}: an image has file_name {name!r}; it must be a name")
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[0]:
        raise UserError(
            f"{source}: file_name {name!r} leaves the image folder; make it relative"
        )
    return str(parts)


def load_json(path: str, what: str):
    """Parsed JSON, or UserError."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError as error:
        raise UserError(f"{path}: {what} not found") from error
    except OSError as error:
        raise UserError(f"{path}: {what} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {what} is not JSON ({error})") from error


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
    raw = load_json(path, "COCO JSON")
    keys = ("images", "annotations", "categories")
    if not isinstance(raw, dict) or not all(
        isinstance(raw.get(key), list) for key in keys
    ):
        raise UserError(
            f"{path}: not COCO format: it must have the lists {', '.join(keys)}"
        )
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: image folder not found")
    try:
        return _pack(raw, path, folder, names)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{path}: not COCO format: a record has no proper {error}"
        ) from error


def _pack(raw: dict, path: str, folder: str, names: list[str] | None) -> Dataset:
    """The arrays of a `Dataset` from a parsed JSON (the body of `load_coco`)."""
    # Sorted by id: the order of a JSON's list is an accident, labels must not be.
    categories = sorted(raw["categories"], key=lambda category: category["id"])
    own = [category["name"] for category in categories]
    if (
        len(set(own)) < len(own)
        or len({c["id"] for c in categories}) < len(own)
        or not own
    ):
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
    label_of = {c["id"]: names.index(c["name"]) + 1 for c in categories}
    id_of = {c["name"]: c["id"] for c in categories}
    dataset = Dataset(path, folder, list(names), [id_of.get(name) for name in names])

    position, sizes, names_seen = {}, [], set()
    for image in raw["images"]:
        if image["id"] in position:
            raise UserError(
                f"{path}: two images have the id {image['id']}; make ids unique"
            )
        position[image["id"]] = len(position)
        if image["file_name"] in names_seen:
            raise UserError(
                f"{path}: two images have the file_name {image['file_name']!r}; the "
                "split could not tell them apart"
            )
        names_seen.add(image["file_name"])
        dataset.files.append(safe_name(image["file_name"], path))
        dataset.image_ids.append(image["id"])
        height, width = image["height"], image["width"]
        if not (
            isinstance(height, int)
            and isinstance(width, int)
            and min(height, width) > 0
        ):
            raise UserError(
                f"{path}: image {image['file_name']!r} has height {height!r} and "
                f"width {width!r}; both must be whole numbers above 0"
            )
        sizes.append((height, width))
    if not position:
        raise UserError(f"{path}: lists no image")
    dataset.folders = [folder] * len(position)
    dataset.sizes = np.array(sizes, np.int64)
    dataset.annotated = len(position)

    # Grouped by image; the order within an image is kept.
    rows = [[] for _ in position]
    for record in raw["annotations"]:
        if record["image_id"] not in position:
            raise UserError(
                f"{path}: annotation {record.get('id')} is of image "
                f"{record['image_id']}, which is not listed"
            )
        if record["category_id"] not in label_of:
            raise UserError(
                f"{path}: annotation {record.get('id')} has category "
                f"{record['category_id']}, which is not listed"
            )
        rows[position[record["image_id"]]].append(record)

    labels, crowd, polygonal = array("q"), array("b"), array("b")
    first, part_first, byte_first, data = (
        array("q", [0]),
        array("q", [0]),
        array("q", [0]),
        [],
    )
    skipped = 0
    for records, size in zip(rows, sizes, strict=True):
        for record in records:
            parts, is_polygon = _parts(record, size, path)
            if not parts:
                skipped += 1
                continue
            labels.append(label_of[record["category_id"]])
            crowd.append(bool(record.get("iscrowd", 0)))
            polygonal.append(is_polygon)
            for part in parts:
                data.append(part)
                byte_first.append(byte_first[-1] + len(part))
            part_first.append(part_first[-1] + len(parts))
        first.append(len(labels))
    if skipped:
        dataset.warnings.append(
            f"{path}: {skipped} annotations without a mask are left out"
        )
    dataset.labels = np.array(labels, np.int64)
    dataset.crowd, dataset.polygonal = np.array(crowd, bool), np.array(polygonal, bool)
    dataset.first, dataset.part_first = np.array(first), np.array(part_first)
    dataset.byte_first = np.array(byte_first)
    dataset.bytes = np.frombuffer(b"".join(data), np.uint8)
    return dataset


def _parts(record: dict, size: tuple[int, int], path: str) -> tuple[list[bytes], bool]:
    """The bytes of an annotation's polygons (float64), or of its compressed RLE."""
    segmentation = record.get("segmentation")
    if isinstance(segmentation, dict):
        if list(segmentation["size"]) != list(size):
            raise UserError(
                f"{path}: annotation {record.get('id')} has an RLE of size "
                f"{segmentation['size']}, its image is {list(size)}"
            )
        counts = segmentation["counts"]
        if isinstance(counts, list):
            # pycocotools would read beyond the end of runs that are too short.
            if min(counts, default=-1) < 0 or sum(counts) != size[0] * size[1]:
                raise UserError(
                    f"{path}: annotation {record.get('id')} has an RLE whose runs "
                    "do not add up to its image"
                )
            # COCO's crowds: run lengths as numbers. One form of RLE is enough.
            counts = mask_utils.frPyObjects(segmentation, *size)["counts"]
        return [counts.encode() if isinstance(counts, str) else counts], False
    # A polygon needs three corners; pycocotools takes four numbers for a box.
    polygons = [part for part in segmentation or [] if len(part) >= 6]
    parts = []
    for polygon in polygons:
        if len(polygon) % 2:
            raise UserError(
                f"{path}: annotation {record.get('id')} has a polygon with an odd "
                "number of coordinates"
            )
        try:
            parts.append(array("d", polygon).tobytes())
        except TypeError as error:
            raise UserError(
                f"{path}: annotation {record.get('id')} has a polygon that is "
                f"not a list of numbers"
            ) from error
    return parts, True


def add_folder(dataset: Dataset, folder: str) -> list[int]:
    """Append the images of a bare folder; returns their indices.

    They have no annotations and never will: sizes are left unknown. Files that the
    dataset lists already are passed over, since the labelled and the unlabelled images
    often share a folder.

    Raises:
        UserError: no such folder, or no image in it.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: folder of unlabelled images not found")
    root = Path(folder)
    names = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.suffix.lower() in images.IMAGE_TYPES
    )
    # The listed ones, by their real path: one file may have two names.
    known = {os.path.realpath(dataset.path(i)) for i in range(len(dataset))}
    names = [name for name in names if os.path.realpath(root / name) not in known]
    if not names:
        raise UserError(
            f"{folder}: no image in it that is not in {dataset.source} already "
            f"({', '.join(images.IMAGE_TYPES)})"
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
