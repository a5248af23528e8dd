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
from PIL import ImageDraw
from pycocotools import mask as mask_utils
from segment_anything import SamPredictor
from tqdm import tqdm

from ssis import UserError, sam
from ssis.datasets.coco_json import as_number
from ssis.datasets.dataset import Dataset
from ssis.io.files import writing
from ssis.report import pictures


def outlined(raw: dict, source: str) -> list[dict]:
    """Give each annotation without a mask the outline of its box; returns those.

    Raises:
        UserError: no mask, and no box of x, y, width and height.
    """
    found = []
    for record in raw["annotations"]:
        # What is no record, and what is no list, the reader complains about.
        if not isinstance(record, dict):
            continue
        mask = record.get("segmentation") or []
        if not isinstance(mask, list) or any(mask):
            continue
        try:
            x, y, width, height = map(float, record["bbox"])
            if not (width > 0 and height > 0):
                raise ValueError("box")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{source}: annotation {record.get('id')} has neither a mask nor a box "
                "of x, y, width and height; correct or remove it"
            ) from error
        right, bottom = x + width, y + height
        record["segmentation"] = [[x, y, right, y, right, bottom, x, bottom]]
        found.append(record)
    return found


def draw(records: list[dict], dataset: Dataset, args: argparse.Namespace, out: Path):
    """SAM's mask, as RLE, for each of the annotations that have a box alone.

    Args:
        records: of `outlined`; `segmentation` is replaced.
        dataset: what the JSON holds, checked.
        args: `masks_from_boxes` (weights) and `sam` (their kind).
        out: the pictures go to its folder `masks_from_boxes`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        segmenter = sam.SegmentAnything(args.sam, args.masks_from_boxes, device)
    except UserError as error:
        said = str(error).replace("--sam-checkpoint", "--masks-from-boxes")
        raise UserError(said.split(", or give --method")[0]) from error
    predictor, of_image = SamPredictor(segmenter.net), {}
    for record in records:
        of_image.setdefault(as_number(record["image_id"]), []).append(record)
    label = {as_number(c): k for k, c in enumerate(dataset.category_ids, 1)}
    for index in tqdm(range(len(dataset)), unit="image", desc="masks from boxes"):
        mine, masks = of_image.get(as_number(dataset.image_ids[index]), []), []
        if not mine:
            continue
        pixels = dataset.image(index)
        predictor.set_image(pixels.permute(1, 2, 0).numpy())
        for record in mine:
            x, y, width, height = map(float, record["bbox"])
            box = np.array([x, y, x + width, y + height])
            masks.append(predictor.predict(box=box, multimask_output=False)[0][0])
            rle = mask_utils.encode(np.asfortranarray(masks[-1], np.uint8))
            rle["counts"] = rle["counts"].decode()
            area = int(masks[-1].sum())
            record.update(segmentation=rle, area=area, mask_from_box=True)
        labels = torch.tensor([label[as_number(r["category_id"])] for r in mine])
        target = out / "masks_from_boxes" / f"{dataset.files[index]}.png"
        with writing(target, "--out"):
            target.parent.mkdir(parents=True, exist_ok=True)
            shown = (pixels / 255, torch.from_numpy(np.stack(masks)), labels)
            picture = pictures.overlay(*shown, dataset.names, side=800)
            for x, y, width, height in (r["bbox"] for r in mine):
                # What SAM was asked: the box.
                box = np.array([x, y, x + width, y + height], float)
                box *= picture.width / pixels.shape[2]
                ImageDraw.Draw(picture).rectangle(box.tolist(), outline="white")
            picture.save(target)
    print(f"{len(records)} masks drawn; look at them: {out / 'masks_from_boxes'}")
