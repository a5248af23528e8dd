r"""Masks where a tool has exported boxes alone: SAM draws them, a person looks at them.

A box is the prompt to which SAM's answer is the least ambiguous: `segment_anything`'s
own predictor is asked for one mask a box. These masks are guesses. Each such record is
marked (`"mask_from_box": true`), and a picture of each image is written, to be looked
through before anything is trained.

Read next: `ssis/tools/prepare_own.py`, which goes on with them.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import ImageDraw
from pycocotools import mask as mask_utils
from segment_anything import SamPredictor
from tqdm import tqdm

from ssis import UserError, sam
from ssis.datasets import rle
from ssis.datasets.coco_json import as_number
from ssis.datasets.dataset import Dataset
from ssis.io.files import write_text, writing
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
        out: pictures and masks go to its folder `masks_from_boxes`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        segmenter = sam.SegmentAnything(args.sam, args.masks_from_boxes, device)
    except UserError as error:
        said = str(error).replace("--sam-checkpoint", "--masks-from-boxes")
        raise UserError(said.split(", or give --method")[0]) from error
    predictor, of_image, new = SamPredictor(segmenter.net), {}, 0
    for record in records:
        of_image.setdefault(as_number(record["image_id"]), []).append(record)
    label = {as_number(c): k for k, c in enumerate(dataset.category_ids, 1)}
    for index in tqdm(range(len(dataset)), unit="image", desc="masks from boxes"):
        mine = of_image.get(as_number(dataset.image_ids[index]), [])
        if not mine:
            continue
        # What was drawn before, in the same boxes by the same SAM, before a kill or in
        # an earlier round, is not drawn again.
        asked = [args.sam, Path(args.masks_from_boxes).name, [r["bbox"] for r in mine]]
        drawn = out / "masks_from_boxes" / f"{dataset.files[index]}.json"
        known = json.loads(drawn.read_text()) if drawn.exists() else {}
        if known.get("asked") != asked:
            labels = [label[as_number(r["category_id"])] for r in mine]
            image = dataset.image(index)
            masks = answers(predictor, image, asked[-1])
            with writing(drawn, "--out"):
                drawn.parent.mkdir(parents=True, exist_ok=True)
                picture = pictures.overlay(
                    image / 255, masks, torch.tensor(labels), dataset.names, side=800
                )
                for box in corners(asked[-1]) * (picture.width / image.shape[2]):
                    # What SAM was asked.
                    ImageDraw.Draw(picture).rectangle(box.tolist(), outline="white")
                picture.save(drawn.with_suffix(".png"))
                rles = [rle.encode(mask) for mask in masks.numpy()]
                known = dict(asked=asked, masks=rles)
                write_text(drawn, json.dumps(known))
            new += len(mine)
        for record, mask in zip(mine, known["masks"], strict=True):
            area = int(mask_utils.area(mask))
            record.update(segmentation=mask, area=area, mask_from_box=True)
    before = f", {len(records) - new} there already" if new < len(records) else ""
    print(f"{new} masks drawn{before}; look at them: {out / 'masks_from_boxes'}")


def answers(predictor: SamPredictor, image: torch.Tensor, boxes: list) -> torch.Tensor:
    """SAM's masks (N, H, W) bool, of an image (3, H, W) uint8, in boxes x, y, w, h."""
    predictor.set_image(image.permute(1, 2, 0).numpy())
    masks = [
        predictor.predict(box=box, multimask_output=False)[0][0]
        for box in corners(boxes)
    ]
    return torch.from_numpy(np.stack(masks))


def corners(boxes: list) -> np.ndarray:
    """COCO's boxes x, y, width, height as (N, 4) of xyxy."""
    x, y, width, height = np.array(boxes, float).T
    return np.stack([x, y, x + width, y + height], axis=1)
