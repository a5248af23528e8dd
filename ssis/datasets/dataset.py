r"""A COCO-format dataset, its annotations packed into a few arrays.

*Why packed.* A Python list of dicts is copied, page by page, into each loader worker,
because reading an object writes its reference count; with COCO that is gigabytes per
worker. Arrays are shared.

*A box is the box of its mask.* The annotated boxes, areas and ids are not used: they
are often wrong, and all of them follow from the mask.

*Two uses.* Training reads an image and its `target`, torchvision's dict of ground
truth; evaluation reads the same annotations as pycocotools' object (`coco`). Crowds are
in the second alone: a detection on one counts neither for nor against the model.

Read next: `ssis/datasets/coco_json.py`, which fills one from a file.
"""

import contextlib
import io
import os
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from torch import Tensor

from ssis import UserError
from ssis.targets import sanitize
from ssis.datasets import rle
from ssis.datasets.file_names import nearest
from ssis.io import images


class Dataset:
    """A COCO-format dataset: images, and their annotations packed into arrays.

    It begins empty; `coco_json.load_coco` fills it.

    Args:
        source: path of the JSON (or folder), for messages.
        folder: the folder of the images.
        names: class names; `names[k - 1]` belongs to label k.
        category_ids: the dataset's own ids, in the same order; None where the JSON has
            no such class.

    Attributes:
        source, folder, names, category_ids: as given.
        files: image names relative to `folder`, "/" between folders.
        folders: the folder of each image.
        image_ids: the dataset's own ids (any JSON value, kept for the predictions).
        sizes: (N, 2) int64 height and width; zeros where unknown (a bare folder).
        annotated: the first so many images have ground truth; those of a bare folder,
            which follow, have none.
        warnings: lines about what was passed over while reading.
        group_by: the expression with which `prepare own` was told what copies are.
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
        self.group_by = ""
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
        """Height and width according to the JSON; None for a bare folder's images."""
        return tuple(self.sizes[index].tolist()) if self.sizes[index].any() else None

    def rles(self, index: int) -> list[dict]:
        """The masks of an image as pycocotools' compressed RLEs, crowds included.

        In the order of `annotations`; the image must be one of the annotated.
        """
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

    def annotations(self, index: int) -> list[tuple[int, bool]]:
        """Label of each annotation of an image, and whether it is a crowd."""
        rows = slice(self.first[index], self.first[index + 1])
        return list(
            zip(self.labels[rows].tolist(), self.crowd[rows].tolist(), strict=True)
        )

    def target(self, index: int) -> dict:
        """The ground truth of an image in the original frame.

        Crowds ("many people") are left out: they are no instances. So the pixels of a
        crowd are taught as background, as in torchvision's own training.

        Returns:
            `boxes` (N, 4) float32 xyxy, `labels` (N,) int64 in 1..C, `masks` (N, H, W)
            uint8 of 0 and 1; an instance without pixels is left out.

        Raises:
            UserError: an RLE that cannot be decoded.
        """
        rows = slice(self.first[index], self.first[index + 1])
        single = ~self.crowd[rows]
        height, width = self.sizes[index].tolist()
        rles = [mask for mask, one in zip(self.rles(index), single, strict=True) if one]
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
        """Mean number of instances of the images in `indices`; crowds do not count."""
        singles = np.concatenate([[0], np.cumsum(~self.crowd)])
        counts = singles[self.first[1:]] - singles[self.first[:-1]]
        return float(counts[indices].mean()) if len(indices) else 0.0

    def most_instances(self, indices: list[int]) -> int:
        """The largest number of instances of an image in `indices`, without crowds."""
        singles = np.concatenate([[0], np.cumsum(~self.crowd)])
        counts = singles[self.first[1:]] - singles[self.first[:-1]]
        return int(counts[indices].max(initial=0))

    def class_counts(self, indices: list[int]) -> Tensor:
        """How many instances of each class the images in `indices` have: (C,) int64."""
        labels = [
            self.labels[self.first[i] : self.first[i + 1]][
                ~self.crowd[self.first[i] : self.first[i + 1]]
            ]
            for i in indices
        ]
        counts = np.bincount(np.concatenate(labels), minlength=len(self.names) + 1)[1:]
        return torch.from_numpy(counts)

    def class_shares(self, indices: list[int]) -> Tensor:
        """Fraction of each class among the instances of the images in `indices`.

        Returns:
            (C,) float32 with sum 1, or all 0 where there is no instance.
        """
        counts = self.class_counts(indices)
        return (counts / counts.sum().clamp(min=1)).float()

    def coco(self, indices: list[int]) -> COCO:
        """The ground truth of the images in `indices` as pycocotools' object.

        Category ids are the labels, image ids the indices. Areas and boxes are computed
        from the masks: COCO's AP by size would repeat a wrong `area`.
        """
        records, annotations = [], []
        for index in indices:
            height, width = self.sizes[index].tolist()
            records.append(dict(id=int(index), height=height, width=width))
            for row, mask in enumerate(self.rles(index), self.first[index]):
                # A polygon may be so thin that it has no pixel: nobody can find it.
                if not mask_utils.area(mask):
                    continue
                # Ids from 1: pycocotools takes a match with id 0 for none.
                ids = dict(id=len(annotations) + 1, image_id=int(index))
                label, crowd = self.labels[row], self.crowd[row]
                annotations.append(rle.annotation(mask, label, crowd, **ids))
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
        """Look for every image before the training starts, rather than hours into it.

        In a dataset of up to 20,000 images the headers are read too, some 0.1 ms each,
        so that a wrong size is seen now; in a larger one it is seen when the image is
        read.

        Raises:
            UserError: a file is missing, is no image, or is of another size.
        """
        for index in range(len(self)):
            self.check_file(index, header=len(self) <= 20_000)

    def check_file(self, index: int, header: bool = True) -> None:
        """Raise UserError when an image is missing or its header does not fit.

        Args:
            index: number of the image.
            header: whether to read the header too.
        """
        path = self.path(index)
        if not os.path.isfile(path):
            close = nearest(self.files[index], Path(self.folders[index]))
            hint = f" The nearest name in it is {close}" if close else ""
            raise UserError(
                f"{path}: image not found, but listed in {self.source}; is the image "
                f"folder the right one?{hint}"
            )
        if header:
            images.check_header(path, self.size(index))
