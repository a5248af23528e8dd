r"""COCO-format datasets, the labelled/unlabelled split, loaders.

Semi-supervised learning is one decision about data: which images keep their masks. It
is taken once, from the seed, before training starts, and written to `labeled.json`; a
split drawn again by every process would leak labels from one into another.

Three further decisions are worth knowing:

* *Annotations are packed into a few numpy arrays.* A Python list of dicts is copied,
  page by page, into each loader worker, because reading an object writes its
  reference count; with COCO that is gigabytes per worker. Arrays are shared.
* *A box is the box of its mask.* The annotated boxes, areas and ids are not used: they
  are wrong often enough, and the mask says it all.
* *The stream of batches is a pure function of the seed and the step.* Item k of the
  stream knows its image and the seed of its augmentation. So resuming needs only
  the step's number, and neither the number of workers nor of processes changes
  what is trained on.

Contracts: labels are 1..C in the order of the category ids, which may have gaps or
start at 0; boxes xyxy, absolute pixels, float32, `x2 > x1`, `y2 > y1`.

Read next: `ssis/augment.py`, the views of an image.
"""

import contextlib
import hashlib
import io
import json
import os
import sys
from array import array
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from torch import Tensor
from torchvision.ops import masks_to_boxes

from ssis import UserError, augment, distributed, shapes

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp")
# EXIF orientations 5 to 8 swap width and height.
SWAPS_SIDES = (5, 6, 7, 8)


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


def read_image(path: str, expected: tuple[int, int] | None = None) -> Tensor:
    """Any image file as (3, H, W) uint8 RGB, upright.

    Args:
        path: the file: gray, palette, CMYK, with alpha, 16 bits, EXIF-rotated.
        expected: (height, width) that the annotations speak of, if they do.

    Raises:
        UserError: not there, not an image, or of another size than expected.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            # Most tools annotate the picture as viewers show it, some as it is stored;
            # the size in the JSON tells which.
            if expected and upright.size[::-1] != expected and image.size[::-1] == expected:
                upright = image
            if upright.mode.startswith(("I", "F")):
                # Pillow would clip 16-bit values at 255 and so turn them white.
                values = np.asarray(upright, dtype=np.float64)
                top = 65535 if values.max(initial=0) > 255 else 255
                upright = Image.fromarray((values.clip(0, top) * (255 / top)).astype(np.uint8))
            pixels = np.array(upright.convert("RGB"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: image not found; is the image folder the right one?") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); replace it or "
                        "remove it from the JSON") from error  # fmt: skip
    check_size(path, pixels.shape[:2], expected)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def check_size(path: str, found: tuple, expected: tuple | None) -> None:
    """Raise UserError when an image is not of the size its annotations were made on."""
    if expected and tuple(found) != tuple(expected):
        raise UserError(
            f"{path}: is {found[1]} x {found[0]} pixels, the JSON says "
            f"{expected[1]} x {expected[0]}; correct width and height, or the file"
        )


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
        height, width = self.sizes[index].tolist()
        return read_image(self.path(index), (height, width) if height else None)

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
        masks = mask_utils.decode(rles) if rles else np.zeros((height, width, 0), np.uint8)
        # A contiguous (N, H, W): pycocotools decodes into (H, W, N), columns first.
        masks = torch.from_numpy(np.ascontiguousarray(masks.transpose(2, 0, 1)))
        return sanitize(dict(labels=torch.from_numpy(self.labels[rows][single]), masks=masks))

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
        images, annotations = [], []
        for index in indices:
            height, width = self.sizes[index].tolist()
            images.append(dict(id=int(index), height=height, width=width))
            for row, rle in enumerate(self.rles(index), self.first[index]):
                annotations.append(
                    # Ids from 1: pycocotools takes a match with id 0 for none.
                    dict(id=len(annotations) + 1, image_id=int(index), segmentation=rle,
                         category_id=int(self.labels[row]), iscrowd=int(self.crowd[row]),
                         area=float(mask_utils.area(rle)),
                         bbox=mask_utils.toBbox(rle).tolist())
                )  # fmt: skip
        categories = [dict(id=k, name=name) for k, name in enumerate(self.names, 1)]
        coco = COCO()
        # `info` must be there: loadRes of some versions copies it without asking.
        coco.dataset = dict(info={}, images=images, annotations=annotations,
                            categories=categories)  # fmt: skip
        # pycocotools prints as it indexes.
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def check_files(self) -> None:
        """Look for every image before the training starts, rather than hours into it.

        Up to 20,000 images their headers are read too, some 0.1 ms each, so that a wrong
        size is seen now; in a larger dataset it is seen when the image's turn comes.
        """
        for index in range(len(self)):
            path = self.path(index)
            if not os.path.isfile(path):
                raise UserError(f"{path}: image not found, but listed in {self.source}; "
                                "is the image folder the right one?")  # fmt: skip
            if len(self) <= 20_000:
                try:
                    with Image.open(path) as image:
                        size = image.size[::-1]
                        turned = image.getexif().get(0x0112) in SWAPS_SIDES
                except (OSError, ValueError, SyntaxError) as error:
                    raise UserError(f"{path}: cannot be read as an image ({error}); replace "
                                    f"it or remove it from {self.source}") from error  # fmt: skip
                expected = tuple(self.sizes[index].tolist())
                if any(expected) and not (turned and size[::-1] == expected):
                    check_size(path, size, expected)


def safe_name(name, source: str) -> str:
    """A file name from a JSON, or UserError when it leaves the image folder."""
    if not isinstance(name, str) or not name:
        raise UserError(f"{source}: an image has file_name {name!r}; it must be a name")
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[0]:
        raise UserError(f"{source}: file_name {name!r} leaves the image folder; make it relative")
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
    if not isinstance(raw, dict) or not all(isinstance(raw.get(key), list) for key in keys):
        raise UserError(f"{path}: not COCO format: it must have the lists {', '.join(keys)}")
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: image folder not found")
    try:
        return _pack(raw, path, folder, names)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: not COCO format: a record has no proper {error}") from error


def _pack(raw: dict, path: str, folder: str, names: list[str] | None) -> Dataset:
    """The arrays of a `Dataset` from a parsed JSON (the body of `load_coco`)."""
    # Sorted by id: the order of a JSON's list is an accident, labels must not be.
    categories = sorted(raw["categories"], key=lambda category: category["id"])
    own = [category["name"] for category in categories]
    if len(set(own)) < len(own) or len({c["id"] for c in categories}) < len(own) or not own:
        raise UserError(f"{path}: categories must be there, with ids and names given only once")
    names = names or own
    unknown = sorted(set(own) - set(names))
    if unknown:
        raise UserError(f"{path}: unknown class {unknown[0]!r}; the model knows "
                        f"{', '.join(names[:8])}{' …' if len(names) > 8 else ''}")  # fmt: skip
    label_of = {c["id"]: names.index(c["name"]) + 1 for c in categories}
    id_of = {c["name"]: c["id"] for c in categories}
    dataset = Dataset(path, folder, list(names), [id_of.get(name) for name in names])

    position = {}
    sizes = []
    for image in raw["images"]:
        if image["id"] in position:
            raise UserError(f"{path}: two images have the id {image['id']}; make ids unique")
        position[image["id"]] = len(position)
        dataset.files.append(safe_name(image["file_name"], path))
        dataset.image_ids.append(image["id"])
        height, width = image["height"], image["width"]
        if not (isinstance(height, int) and isinstance(width, int) and min(height, width) > 0):
            raise UserError(f"{path}: image {image['file_name']!r} has height {height!r} and "
                            f"width {width!r}; both must be whole numbers above 0")  # fmt: skip
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
            raise UserError(f"{path}: annotation {record.get('id')} is of image "
                            f"{record['image_id']}, which is not listed")  # fmt: skip
        if record["category_id"] not in label_of:
            raise UserError(f"{path}: annotation {record.get('id')} has category "
                            f"{record['category_id']}, which is not listed")  # fmt: skip
        rows[position[record["image_id"]]].append(record)

    labels, crowd, polygonal = array("q"), array("b"), array("b")
    first, part_first, byte_first, data = array("q", [0]), array("q", [0]), array("q", [0]), []
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
        dataset.warnings.append(f"{path}: {skipped} annotations without a mask are left out")
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
            raise UserError(f"{path}: annotation {record.get('id')} has an RLE of size "
                            f"{segmentation['size']}, its image is {list(size)}")  # fmt: skip
        counts = segmentation["counts"]
        if isinstance(counts, list):
            # COCO's crowds: run lengths as numbers. One form of RLE is enough.
            counts = mask_utils.frPyObjects(segmentation, *size)["counts"]
        return [counts.encode() if isinstance(counts, str) else counts], False
    # A polygon needs three corners; pycocotools takes four numbers for a box.
    polygons = [part for part in segmentation or [] if len(part) >= 6]
    parts = []
    for polygon in polygons:
        if len(polygon) % 2:
            raise UserError(f"{path}: annotation {record.get('id')} has a polygon with an odd "
                            "number of coordinates")  # fmt: skip
        try:
            parts.append(array("d", polygon).tobytes())
        except TypeError as error:
            raise UserError(f"{path}: annotation {record.get('id')} has a polygon that is "
                            f"not a list of numbers") from error  # fmt: skip
    return parts, True


def part_paths(config, part: str) -> tuple[str, str]:
    """JSON and image folder of "train", "val" or "test".

    A flag says so (`--train-json`), or the preset's folder `data` holds
    `instances_<part>.json` beside `<part>/`. Without test part it is the validation
    part.
    """
    source, folder = getattr(config, f"{part}_json"), getattr(config, f"{part}_images")
    if bool(source) != bool(folder):
        raise UserError(f"--{part}-json and --{part}-images go together: give both, or neither")
    if not source and config.data and not config.val_json:
        source, folder = f"{config.data}/instances_{part}.json", f"{config.data}/{part}"
    if part == "test" and not os.path.exists(source):
        if source and source == config.test_json:
            raise UserError(f"{source}: COCO JSON not found")
        return part_paths(config, "val")
    if not source:
        raise UserError(f"--{part}-json J --{part}-images D: needed with --preset {config.preset}")
    return source, folder


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
        if path.suffix.lower() in IMAGE_TYPES
    )
    # The listed ones, by their real path: one file may have two names.
    known = {os.path.realpath(dataset.path(i)) for i in range(len(dataset))}
    names = [name for name in names if os.path.realpath(root / name) not in known]
    if not names:
        raise UserError(f"{folder}: no image in it that is not in {dataset.source} already "
                        f"({', '.join(IMAGE_TYPES)})")  # fmt: skip
    start = len(dataset)
    dataset.files += names
    dataset.folders += [folder] * len(names)
    # No id in the JSON: the name serves.
    dataset.image_ids += names
    dataset.sizes = np.concatenate([dataset.sizes, np.zeros((len(names), 2), np.int64)])
    dataset.first = np.concatenate([dataset.first, np.full(len(names), dataset.first[-1])])
    return list(range(start, len(dataset)))


def draw_split(dataset: Dataset, labeled: str, seed: int) -> tuple[list[int], list[str]]:
    """Choose the labelled images.

    Args:
        dataset: the training images, all annotated.
        labeled: "5%" of the images, "64" images, or the path of a split's JSON.
        seed: of the draw; not used for a given split.

    Returns:
        Sorted indices of the labelled images, and warnings.

    Raises:
        UserError: nothing to choose, too many, or a split that names unknown images.
    """
    # Images of a bare folder have no masks to be labelled with.
    total = dataset.annotated
    if labeled.endswith(".json"):
        return read_split(dataset, labeled), []
    try:
        share = float(labeled[:-1]) / 100 if labeled.endswith("%") else None
        count = round(share * total) if share is not None else int(labeled)
    except ValueError as error:
        raise UserError(f"--labeled {labeled}: must be a share (5%), a number of images (64) or "
                        "the path of a split's .json") from error  # fmt: skip
    if not 1 <= count <= total:
        raise UserError(f"--labeled {labeled}: that is {count} of {total} images; "
                        f"choose from 1 to {total}")  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(total, generator=generator).tolist()
    # Cover the classes first, the rarest first, each by the first image of the random
    # order that has it: a class without one labelled instance can never be learnt.
    holders: dict[int, list[int]] = {}
    for index in order:
        for label in dataset.present_labels(index):
            holders.setdefault(label, []).append(index)
    chosen: list[int] = []
    for label in sorted(holders, key=lambda label: (len(holders[label]), label)):
        if len(chosen) < count and not set(chosen) & set(holders[label]):
            chosen.append(holders[label][0])
    # The rest of the budget is uniform.
    taken = set(chosen)
    chosen += [index for index in order if index not in taken][: count - len(chosen)]
    covered = set().union(*(dataset.present_labels(index) for index in chosen))
    missing = [name for k, name in enumerate(dataset.names, 1) if k not in covered]
    warnings = []
    if missing:
        shown = ", ".join(missing[:8]) + (" …" if len(missing) > 8 else "")
        warnings.append(f"{len(missing)} of {len(dataset.names)} classes have no labelled "
                        f"instance and cannot be learnt: {shown}")  # fmt: skip
    if not covered:
        raise UserError(f"{dataset.source}: the {count} labelled images have no instance at all; "
                        "label more images, or annotate some")  # fmt: skip
    return sorted(chosen), warnings


def write_split(dataset: Dataset, indices: list[int], path: Path, seed: int) -> None:
    """Write `labeled.json`, which `--labeled` takes back.

    The checksum of all the images' names says what the split was drawn from.
    """
    names = "\n".join(dataset.files).encode()
    split = dict(
        source=os.path.basename(dataset.source), seed=seed, of=len(dataset),
        sha256=hashlib.sha256(names).hexdigest(),
        labeled=[dataset.files[index] for index in indices],
    )  # fmt: skip
    path.write_text(json.dumps(split, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_split(dataset: Dataset, path: str) -> list[int]:
    """Indices of the images that a split names; a list, or a dict with `labeled`."""
    raw = load_json(path, "split")
    names = raw.get("labeled") if isinstance(raw, dict) else raw
    if not isinstance(names, list) or not names:
        raise UserError(f"{path}: not a split: it must be a list of file names, or "
                        '{"labeled": [...]}')  # fmt: skip
    position = {dataset.files[index]: index for index in range(dataset.annotated)}
    unknown = [name for name in names if not isinstance(name, str) or name not in position]
    if unknown:
        raise UserError(f"{path}: names {len(unknown)} images that {dataset.source} does not "
                        f"list, the first is {unknown[0]!r}")  # fmt: skip
    return sorted({position[name] for name in names})


class Stream(torch.utils.data.Dataset):
    """An endless shuffled sequence of views; item k is the same in every run.

    Item k is image `perm_e[k mod n]` in epoch `e = k div n`, with a permutation and an
    augmentation that depend on (seed, k) alone.

    Args:
        dataset: where the images are.
        indices: which of them take part; at least one.
        config: for the views' sizes.
        seed: of this stream; labelled and unlabelled streams have different ones.
        with_target: False hides the annotations, as semi-supervised learning demands.
    """

    def __init__(self, dataset: Dataset, indices: list[int], config, seed: int, with_target: bool):
        self.dataset, self.indices = dataset, np.array(indices, np.int64)
        self.config, self.seed, self.with_target = config, seed, with_target
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def __getitem__(self, k: int) -> dict:
        """A weak view: image (3, h, w) float in [0, 1], its seed, and the target if any."""
        epoch, place = divmod(k, len(self.indices))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
            order = torch.randperm(len(self.indices), generator=generator).numpy()
            self._epoch, self._order = epoch, order
        index = int(self.indices[self._order[place]])
        target = self.dataset.target(index) if self.with_target else None
        seed = _mix(self.seed, ~k)
        image, target = augment.weak_view(
            self.dataset.image(index), target, self.config, seed
        )
        item = dict(image=image, index=index, seed=seed)
        return item if target is None else dict(item, target=sanitize(target))


def _mix(seed: int, number: int) -> int:
    """One 63-bit seed from two numbers, unrelated for neighbouring numbers."""
    digest = hashlib.blake2b(f"{seed},{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Shard(torch.utils.data.Sampler):
    """Positions of one process: its part of each global batch, from a step on.

    The global batch of step s is items s * B to (s + 1) * B of the stream, whatever the
    number of processes; process r of n takes the r-th n-th of it.
    """

    def __init__(self, batch: int, start: int, stop: int, rank: int, world: int):
        self.batch, self.start, self.stop = batch, start, stop
        self.rank, self.share = rank, batch // world

    def __iter__(self):
        for step in range(self.start, self.stop):
            begin = step * self.batch + self.rank * self.share
            yield list(range(begin, begin + self.share))

    def __len__(self) -> int:
        return max(0, self.stop - self.start)


def batches(stream: Stream, batch: int, start: int, run):
    """Batches (lists of items) from a step on to the end, for one process.

    Args:
        stream: what to draw from.
        batch: size of the global batch.
        start: the first step.
        run: `train.Run`.

    Raises:
        UserError: the batch cannot be shared out equally.
    """
    if batch % run.world:
        raise UserError(f"a batch of {batch} images cannot be shared by {run.world} processes; "
                        "choose --labeled-batch and --unlabeled-batch accordingly")  # fmt: skip
    shard = Shard(batch, start, run.config.stage_ends[-1], run.rank, run.world)
    return iter(
        torch.utils.data.DataLoader(
            stream,
            batch_sampler=shard,
            num_workers=run.config.workers,
            # Images differ in size: a batch is a list.
            collate_fn=list,
            # The streams carry their own seeds; the loader must not consume the global
            # ones, or the number of restarts would change the results.
            generator=torch.Generator(),
        )
    )


class Streams(NamedTuple):
    """The three streams of a run. Only `labeled` and `audit` know any truth."""

    labeled: Stream
    unlabeled: Stream
    audit: Stream | None


def streams(train_set: Dataset, labeled: list[int], unlabeled: list[int], config) -> Streams:
    """The streams of a run, each with a seed of its own.

    The audit's is over those unlabelled images whose truth is known; None without any.
    """
    audited = [i for i in unlabeled if i < train_set.annotated]
    return Streams(
        Stream(train_set, labeled, config, config.seed * 3, True),
        Stream(train_set, unlabeled, config, config.seed * 3 + 1, False),
        Stream(train_set, audited, config, config.seed * 3 + 2, True) if audited else None,
    )


def prepare(config) -> None:
    """Once, before all else: draw the built-in dataset, check every image file."""
    if config.preset == "shapes" and not config.train_json:
        shapes.make(Path(config.data))
    for part in open_parts(config):
        part.check_files()


def open_parts(config) -> tuple[Dataset, Dataset, Dataset]:
    """Training, validation and test datasets, with the training set's classes."""
    train_set = load_coco(*part_paths(config, "train"))
    if config.unlabeled_images:
        add_folder(train_set, config.unlabeled_images)
    val, test = (load_coco(*part_paths(config, part), train_set.names) for part in ("val", "test"))
    return train_set, val, test


def split(train_set: Dataset, config, path: Path) -> tuple[list[int], list[int]]:
    """Labelled and unlabelled images of a run: as written in its folder, or drawn now.

    Raises:
        UserError: no unlabelled image is left for a method that needs some.
    """

    def draw() -> list[int]:
        if not path.exists():
            chosen, warnings = draw_split(train_set, config.labeled, config.seed)
            for line in train_set.warnings + warnings:
                print(f"warning: {line}", file=sys.stderr)
            write_split(train_set, chosen, path, config.seed)
        return read_split(train_set, str(path))

    labeled = distributed.from_main(draw)
    hidden = set(labeled)
    unlabeled = [i for i in range(len(train_set))
                 if config.unlabeled_includes_labeled or i not in hidden]  # fmt: skip
    if not unlabeled and config.method != "supervised":
        raise UserError(f"--labeled {config.labeled}: no unlabelled image is left for --method "
                        f"{config.method}; label fewer, or give --unlabeled-images")  # fmt: skip
    return labeled, unlabeled
