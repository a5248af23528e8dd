r"""Cityscapes and PASCAL VOC as COCO JSON, image by image, in several processes.

* **Cityscapes**: a pixel of `*_gtFine_instanceIds.png` is `1000 * class + number` where
  there is an instance, and the class alone where the members of a group could not be
  told apart: such a group of one of the eight instance classes becomes a crowd.
* **VOC 2012**: object k in `SegmentationObject/*.png` is the k-th `<object>` of
  `Annotations/*.xml`, which has its class. The border around objects (255) belongs to
  none of them.

Masks become RLEs. Each converted image is a line of `.instances_train.partial` until
all are there; a command that was killed goes on after the last complete line.

Read next: `ssis/tools/prepare.py`, the command.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from tqdm import tqdm

from ssis import UserError
from ssis.datasets import rle
from ssis.io.files import write_text, writing

# The eight classes of Cityscapes' instance task, by their id in the files.
CITYSCAPES = {
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
VOC = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor"
).split()


class Job(NamedTuple):
    """One image to convert."""

    # Relative to the image folder.
    name: str
    image: str
    # The files with its ground truth.
    ground_truth: tuple[str, ...]


# --------------------------------------------------------------------------- Cityscapes


def cityscapes_jobs(root: Path, part: str) -> tuple[list[Job], Path]:
    """The images of a part of Cityscapes, and their folder."""
    folder, jobs = root / "leftImg8bit" / part, []
    for image in sorted(folder.glob("*/*_leftImg8bit.png")):
        stem = image.name.removesuffix("_leftImg8bit.png")
        city = root / "gtFine" / part / image.parent.name
        ids = city / f"{stem}_gtFine_instanceIds.png"
        jobs.append(Job(f"{image.parent.name}/{image.name}", str(image), (str(ids),)))
    return jobs, folder


def cityscapes_annotations(job: Job) -> tuple[tuple[int, int], list[dict]]:
    """Size (height, width) of an image, and its annotations without ids."""
    # Column by column in memory, as pycocotools wants each mask: copied once for all.
    ids = np.asfortranarray(pixels(job.ground_truth[0]))  # (H, W) uint16
    present = np.flatnonzero(np.bincount(ids.ravel(order="K")))
    annotations = []
    for value in present.tolist():
        # 26003 is car number 3; 26 is a group of cars that could not be told apart.
        category, crowd = (value // 1000, 0) if value >= 1000 else (value, 1)
        if category in CITYSCAPES:
            annotations.append(annotation(ids == value, category, crowd))
    return ids.shape, annotations


# --------------------------------------------------------------------------- PASCAL VOC


def voc_jobs(root: Path, part: str) -> tuple[list[Job], Path]:
    """The images of a part of VOC 2012's segmentation task, and their folder."""
    # The archive unpacks to VOCdevkit/VOC2012.
    for inner in ("VOC2012", "VOCdevkit/VOC2012"):
        if (root / inner).is_dir():
            root = root / inner
            break
    listed = root / "ImageSets" / "Segmentation" / f"{part}.txt"
    folder, jobs = root / "JPEGImages", []
    try:
        names = listed.read_text().split()
    except OSError as error:
        raise UserError(
            f"{listed}: cannot be read ({error.strerror}); --root must be VOCdevkit, "
            "or VOC2012 in it"
        ) from error
    for name in names:
        files = (
            str(root / "SegmentationObject" / f"{name}.png"),
            str(root / "Annotations" / f"{name}.xml"),
        )
        jobs.append(Job(f"{name}.jpg", str(folder / f"{name}.jpg"), files))
    return jobs, folder


def voc_annotations(job: Job) -> tuple[tuple[int, int], list[dict]]:
    """Size (height, width) of an image, and its annotations without ids."""
    png, xml = job.ground_truth
    # A palette image: the pixel values are the objects' numbers, not their colors.
    numbers = np.asfortranarray(pixels(png))  # (H, W) uint8
    try:
        objects = [
            entry.findtext("name", "").strip()
            for entry in ElementTree.parse(xml).iter("object")
        ]
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(f"{xml}: cannot be read ({error})") from error
    annotations = []
    for number in np.unique(numbers).tolist():
        # 0 is background, 255 the border of objects, where the annotators disagreed.
        if number in (0, 255):
            continue
        if number > len(objects) or objects[number - 1] not in VOC:
            raise UserError(
                f"{png}: has an object {number}, for which {xml} has no <object> of a "
                "VOC class; are the two of the same release?"
            )
        category = VOC.index(objects[number - 1]) + 1
        annotations.append(annotation(numbers == number, category, 0))
    return numbers.shape, annotations


# ----------------------------------------------------------------------- both of them


class Source(NamedTuple):
    """How a dataset that is not COCO is read.

    Attributes:
        jobs: (root, part) -> its images as jobs, and their folder.
        annotations: job -> size of the image, and its annotations without ids.
        categories: the classes, as COCO writes them.
        example: files that the root must hold, for messages.
    """

    jobs: Callable[[Path, str], tuple[list[Job], Path]]
    annotations: Callable[[Job], tuple[tuple[int, int], list[dict]]]
    categories: list[dict]
    example: str


SOURCES = {
    "cityscapes": Source(
        cityscapes_jobs,
        cityscapes_annotations,
        [dict(id=number, name=name) for number, name in CITYSCAPES.items()],
        "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png and "
        "gtFine/train/aachen/aachen_000000_000019_gtFine_instanceIds.png",
    ),
    "voc": Source(
        voc_jobs,
        voc_annotations,
        [dict(id=number, name=name) for number, name in enumerate(VOC, 1)],
        "ImageSets/Segmentation/train.txt with names of JPEGImages",
    ),
}


def pixels(path: str) -> np.ndarray:
    """The values of a PNG as they are written, (H, W)."""
    try:
        with Image.open(path) as image:
            return np.array(image)
    # Every exception: a damaged file can make Pillow fail in any way.
    except Exception as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({said})") from error


def annotation(mask: np.ndarray, category: int, crowd: int) -> dict:
    """A COCO annotation of a mask (H, W) bool."""
    return rle.annotation(rle.encode(mask), category, crowd)


def convert(task: tuple[str, Job]) -> dict | str:
    """One image, in a process of its own: its record, or what is wrong with it."""
    dataset, job = task
    try:
        size, annotations = SOURCES[dataset].annotations(job)
        with Image.open(job.image) as image:
            own = image.size[::-1]
        if own != size:
            given = job.ground_truth[0]
            return f"{job.image}: is {own}, its ground truth {given} is {size}"
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{job.image}: cannot be read ({error.strerror or error})"
    height, width = size
    return dict(file_name=job.name, height=height, width=width, annotations=annotations)


def convert_part(dataset: str, root: Path, out: Path, part: str, workers: int) -> Path:
    """Write `instances_<part>.json`, going on where an earlier command was stopped.

    Returns:
        The folder of the images.
    """
    jobs, folder = SOURCES[dataset].jobs(root, part)
    if not jobs:
        raise UserError(
            f"{root}: no {part} images of {dataset}; it must hold files such as "
            f"{SOURCES[dataset].example}"
        )
    target, partial = out / f"instances_{part}.json", out / f".instances_{part}.partial"
    mark = mark_of(jobs, root)
    if description(target)[-1:] == [mark]:
        print(f"{target}: is there already; delete it to make it again")
        return folder
    done = read_partial(partial, mark)
    waiting = [(dataset, job) for job in jobs if job.name not in done]
    size = dict(total=len(jobs), initial=len(done), unit="image", desc=part)
    # "spawn": a forked child of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context)
    with writing(partial, "--out"), open(partial, "a") as file, tqdm(**size) as bar:
        try:
            for record in pool.map(convert, waiting, chunksize=4):
                if isinstance(record, str):
                    raise UserError(record)
                done[record["file_name"]] = record
                file.write(json.dumps(record) + "\n")
                file.flush()
                bar.update()
        except BrokenProcessPool as error:
            raise UserError(
                "one of the processes was killed, perhaps because memory ran out; give "
                "fewer --workers, the same command goes on"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    records = [done[job.name] for job in jobs]
    content = assemble(
        records, SOURCES[dataset].categories, f"ssis.prepare {dataset} {part} {mark}"
    )
    with writing(target, "--out"):
        write_text(target, json.dumps(content))
        partial.unlink()
    return folder


def mark_of(jobs: list[Job], root: Path) -> str:
    """A checksum of what a JSON is made from: when it differs, the JSON is made anew.

    It is taken of the images' names and of the names and sizes of their ground truth's
    files, relative to the root, whose own path may be written in many ways.
    """
    lines = []
    for job in jobs:
        lines.append(job.name)
        for path in job.ground_truth:
            size = os.path.getsize(path) if os.path.exists(path) else 0
            lines.append(f"{os.path.relpath(path, root)} {size}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def description(path: Path) -> list[str]:
    """The words of a JSON's description: "ssis.prepare", dataset, part, mark."""
    try:
        return json.loads(path.read_text())["info"]["description"].split()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def read_partial(path: Path, mark: str) -> dict[str, dict]:
    """What an earlier command has converted, by file name.

    The file is written again without a line that a kill left unfinished, and without
    any where they are of other images, as their `mark` tells.
    """
    lines = path.read_text().split("\n") if path.exists() else []
    records = {}
    if lines and lines[0] == mark:
        for line in lines[1:]:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                records[record["file_name"]] = record
    with writing(path, "--out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [mark, *map(json.dumps, records.values())]
        write_text(path, "\n".join(kept) + "\n")
    return records


def assemble(records: list[dict], categories: list[dict], description: str) -> dict:
    """A COCO dataset of converted images; ids count from 1."""
    images, annotations = [], []
    for number, record in enumerate(records, 1):
        names = ("file_name", "height", "width")
        images.append(dict(id=number, **{name: record[name] for name in names}))
        for entry in record["annotations"]:
            ids = dict(id=len(annotations) + 1, image_id=number)
            annotations.append(dict(entry, **ids))
    return dict(
        info=dict(description=description),
        images=images,
        annotations=annotations,
        categories=categories,
    )
