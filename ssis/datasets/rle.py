r"""Masks as COCO writes them: run lengths (RLE), and an annotation around them.

Read next: `ssis/datasets/dataset.py`, which reads such annotations.
"""

import numpy as np
from pycocotools import mask as mask_utils


def encode(mask: np.ndarray) -> dict:
    """A mask (H, W), bool or uint8 of 0 and 1, as compressed RLE that JSON can hold.

    pycocotools reads a mask by columns; a mask stored in that order is not copied.
    """
    rle = mask_utils.encode(np.asfortranarray(mask).view(np.uint8))
    return dict(size=list(mask.shape), counts=rle["counts"].decode())


def annotation(rle: dict, category_id: int, crowd: bool = False, **more) -> dict:
    """A COCO annotation; its area and box are those of the mask.

    Args:
        rle: the mask.
        category_id: of its class.
        crowd: a group of objects, which is no instance.
        more: `id`, `image_id`, `score` ...
    """
    return dict(
        more,
        category_id=int(category_id),
        iscrowd=int(crowd),
        area=int(mask_utils.area(rle)),
        bbox=mask_utils.toBbox(rle).tolist(),
        segmentation=rle,
    )
