r"""Masks where a tool has exported boxes alone: SAM draws them, a person looks at them.

A box is the prompt to which SAM's answer is the least ambiguous: `segment_anything`'s
own predictor is asked for one mask a box. These masks are guesses. Each such record is
marked (`"mask_from_box": true`), and a picture of each image is written, to be looked
through before anything is trained.

Read next: `ssis/tools/prepare_own.py`, which goes on with them.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as mask_utils
from segment_anything import SamPredictor
from tqdm import tqdm

from ssis import UserError, sam
from ssis.datasets.coco_json import as_number
from ssis.datasets.file_names import safe_name
from ssis.io.files import writing
from ssis.io.images import read_image
from ssis.report import pictures


def draw(raw: dict, args: argparse.Namespace, out: Path) -> None:
    """Give each annotation that has a box and no mask SAM's mask, as RLE.

    Args:
        raw: COCO JSON; `segmentation` of its annotations is filled in.
        args: `json` for messages, `root`, `masks_from_boxes` (weights) and `sam`.
        out: the pictures go to its folder `masks_from_boxes`.

    Raises:
        UserError: no such weights, or a record without a usable box.
    """
    boxes: dict[object, list[dict]] = {}
    for record in raw["annotations"]:
        if not record.get("segmentation"):
            boxes.setdefault(as_number(record.get("image_id")), []).append(record)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    segmenter = sam.SegmentAnything(args.sam, args.masks_from_boxes, device)
    predictor = SamPredictor(segmenter.net)
    categories = {as_number(c["id"]): c["name"] for c in raw["categories"]}
    for image in tqdm(raw["images"], unit="image", desc="masks from boxes"):
        records = boxes.get(as_number(image["id"]), [])
        if not records:
            continue
        name = safe_name(image["file_name"], args.json)
        pixels = read_image(str(args.root / name))
        predictor.set_image(pixels.permute(1, 2, 0).numpy())
        masks = torch.cat([one(predictor, record, args.json) for record in records])
        for record, mask in zip(records, masks, strict=True):
            rle = mask_utils.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
            rle["counts"] = rle["counts"].decode()
            record.update(segmentation=rle, mask_from_box=True)
        names = [str(categories[as_number(r["category_id"])]) for r in records]
        labels = torch.arange(1, len(names) + 1)
        target = out / "masks_from_boxes" / Path(name).with_suffix(".png")
        with writing(target, "--out"):
            target.parent.mkdir(parents=True, exist_ok=True)
            shown = pictures.overlay(pixels / 255, masks, labels, names, side=800)
            shown.save(target)
    count = sum(map(len, boxes.values()))
    print(f"{count} masks drawn in boxes; look at them: {out / 'masks_from_boxes'}")


def one(predictor: SamPredictor, record: dict, source: str) -> torch.Tensor:
    """SAM's mask (1, H, W) bool for the box of one annotation."""
    try:
        left, top, width, height = map(float, record["bbox"])
        box = np.array([left, top, left + width, top + height])
        if not (np.isfinite(box).all() and width > 0 and height > 0):
            raise ValueError("box")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{source}: annotation {record.get('id')} has neither a mask nor a box of "
            "x, y, width and height; correct or remove it"
        ) from error
    return torch.from_numpy(predictor.predict(box=box, multimask_output=False)[0])
