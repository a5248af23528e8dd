r"""Pictures: pseudo-labels, predictions.

A number says how many pseudo-labels are right; a picture says what is wrong with the
others. Every evaluation writes `pseudo_<step>.png`, a strip for each of some unlabeled
images: the image, all that the teacher predicts, what the filter keeps, the masks that
SAM drew, the corrected and aligned classes, the uncertainty of the masks, the image
after copy-paste, and the ground truth that training never sees. The end of a run writes
`predictions.png` (the teacher on test images beside the ground truth), `best.png` and
`worst.png` (where it did best and worst). Masks are drawn by torchvision, and put
side by side by Pillow.

Read next: `ssis/report/page.py`, which puts them on a page.
"""

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from pycocotools import mask as mask_utils
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou
from torchvision.utils import draw_segmentation_masks

from ssis import augment, losses
from ssis.report import audit
from ssis.io.files import writing

# Colors that stay apart for color-blind readers (Okabe and Ito, 2008), one by class.
COLORS = [
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (255, 255, 255),
]
TILE = 256
ROWS = 6


def overlay(
    image: Tensor,
    masks: Tensor,
    labels: Tensor,
    names: list[str],
    scores: Tensor | None = None,
    side: int = TILE,
) -> Image.Image:
    """An image with its instances: masks, class names, scores.

    Args:
        image: (3, H, W) float in [0, 1].
        masks: (N, H, W) bool.
        labels: (N,) int64, 1..C.
        names: class names.
        scores: (N,) in [0, 1], or None; the highest lies on top.
        side: long side of the picture, pixels.
    """
    # Resized before drawing. A small image is enlarged by nearest neighbor: pixels, and
    # the edge of its masks, should be seen one by one.
    scale = side / max(image.shape[-2:])
    size = [round(side * scale) for side in image.shape[-2:]]
    mode = "area" if scale < 1 else "nearest"
    pixels = F.interpolate(image.cpu()[None], size, mode=mode)[0]
    pixels = (pixels * 255).to(torch.uint8)
    # If one object got several classes, the one with the highest score lies on top.
    order = torch.arange(len(labels)) if scores is None else scores.cpu().argsort()
    shown = torch.zeros(len(labels), *size, dtype=torch.bool)
    words = []
    for row, k in enumerate(order.tolist()):
        # One at a time: a hundred float masks of a large picture would be gigabytes.
        mask = F.interpolate(masks[k].cpu().float()[None, None], size)[0] > 0
        # Its outline: what is lost if the mask shrinks by two pixels.
        outside = F.pad((~mask).float(), (2, 2, 2, 2), value=1.0)
        edge = mask & (F.max_pool2d(outside, 5, 1) > 0)
        # One call for each: in a single call, pixels of two masks would turn black.
        color = COLORS[(int(labels[k]) - 1) % len(COLORS)]
        pixels = draw_segmentation_masks(pixels, mask, 0.35, color)
        pixels = draw_segmentation_masks(pixels, edge, 1.0, color)
        shown[row] = mask
        score = "" if scores is None else f" {scores[k]:.2f}"
        words.append(names[int(labels[k]) - 1] + score)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    # In a crowd the names would hide what they name.
    if len(shown) <= side // 20:
        write_names(picture, shown, words)
    return picture


def write_names(picture: Image.Image, masks: Tensor, words: list[str]) -> None:
    """Write a text above each mask (N, H, W) of a picture, that of the last first."""
    pen, size, taken = ImageDraw.Draw(picture), max(11, max(picture.size) // 60), []
    style = dict(font_size=size, stroke_width=2)
    for mask, text in zip(reversed(masks.unbind()), reversed(words), strict=True):
        ys, xs = torch.where(mask)
        if not len(ys):
            continue
        at = (xs.min().item(), max(0, ys.min().item() - size - 1))
        box = torch.tensor([pen.textbbox(at, text, **style)])
        # Two texts in one place could not be read: the surer instance keeps its own.
        if not taken or not box_iou(box, torch.cat(taken)).any():
            taken.append(box)
            pen.text(at, text, fill="white", stroke_fill="black", **style)


def plain(image: Tensor) -> Image.Image:
    """An image (3, H, W) float in [0, 1] without anything on it."""
    nothing = torch.zeros(0, *image.shape[-2:], dtype=torch.bool)
    return overlay(image, nothing, torch.zeros(0), [])


def grid(rows: list[list[tuple[Image.Image, str]]], titles: list[str], path) -> None:
    """Write pictures in rows under column titles, each with a note below it, or ""."""
    gap, line = 8, 28  # pixels between two pictures, and for a line of text
    # Rows of landscape photographs need less height than a square tile's.
    heights = [max(picture.height for picture, _ in row) for row in rows]
    size = (gap + len(titles) * (TILE + gap), line + sum(heights) + line * len(rows))
    sheet = Image.new("RGB", size, "white")
    pen, style = ImageDraw.Draw(sheet), dict(fill="black", font_size=14)
    lefts = [gap + column * (TILE + gap) for column in range(len(titles))]
    for left, title in zip(lefts, titles, strict=True):
        pen.text((left + TILE / 2, line / 2), title, anchor="mm", **style)
    top = line
    for row, height in zip(rows, heights, strict=True):
        for left, (picture, note) in zip(lefts, row, strict=True):
            inset = (TILE - picture.width) // 2, (height - picture.height) // 2
            sheet.paste(picture, (left + inset[0], top + inset[1]))
            # From the left: beside the name of a file there is room.
            pen.text((left, top + height + 9), note, anchor="lm", **style)
        top += height + line
    with writing(path):
        sheet.save(path)


def uncertainty(image: Tensor, mask_probs: Tensor) -> Image.Image:
    """Where the masks are uncertain: u of PL-DC Eq. (uncertainty), black to red.

    Args:
        image: (3, H, W) float in [0, 1], shown darkly underneath.
        mask_probs: (N, H, W) in [0, 1]; where instances overlap, the largest u counts.
    """
    u = (1 - losses.certainty(mask_probs.cpu())).amax(0) if len(mask_probs) else 0
    shown = 0.25 * image.cpu().mean(0, keepdim=True).repeat(3, 1, 1)
    shown[0] = shown[0] + u * (1 - shown[0])
    return plain(shown)


def mask_iou(pseudo, item: dict, names: list[str]) -> str:
    """ "mask IoU 0.81", the mean over the matched instances; "" if unknown."""
    if "target" not in item:
        return ""
    sums = audit.tally(pseudo, item["target"], len(names)).sum(dim=0)
    if not sums[audit.MATCHED]:
        return ""
    return f"mask IoU {sums[audit.IOU] / sums[audit.MATCHED]:.2f}"


# What a stage of `train.pseudo_labels` is called above its pictures.
TITLES = dict(
    predicted="predicted by the teacher",
    kept="kept by the filter",
    refined="masks redrawn by SAM",
    corrected="classes corrected",
    aligned="class shares aligned",
    decided="confirmed (three-way)",
    oracle="replaced by the ground truth",
)


def pseudo_labels(
    pairs: list, names: list[str], path: Path, with_uncertainty: bool, paste=None
) -> None:
    """Write a picture of the stages of some unlabeled images, a row for each.

    Args:
        pairs: (item, stages): an item of a `data.Stream`, with its `target` where the
            ground truth is known, and stage -> [`PseudoLabels`] of it.
        names: class names.
        path: the file.
        with_uncertainty: with a column for PL-DC's pixel level.
        paste: S4M's copy-paste: (images, targets, seed) -> images, targets; or None.
    """
    rows = []
    for item, stages in pairs:
        image, final = item["image"], stages["final"][0]
        row = {"unlabeled image": (plain(image), "")}
        for stage, title in TITLES.items():
            if stage in stages:
                p = stages[stage][0]
                tile = overlay(image, p.masks, p.labels, names, p.class_quality)
                row[title] = (tile, mask_iou(p, item, names))
        if with_uncertainty:
            row["uncertainty"] = (uncertainty(image, final.mask_probs), "")
        if paste:
            # Its place among the columns; the picture needs the next image too.
            row["after copy-paste"] = None
        if "target" in item:
            masks, labels = item["target"]["masks"], item["target"]["labels"]
            tile = overlay(image, masks, labels, names)
            row["ground truth (never seen)"] = (tile, "")
        rows.append(row)
    for k in range(0, len(rows), 2) if paste else ():
        # Each image with the next one.
        two = pairs[k : k + 2]
        images = [item["image"] for item, _ in two]
        targets = [stages["final"][0].target() for _, stages in two]
        targets = [{key: t.cpu() for key, t in target.items()} for target in targets]
        for row, image, target in zip(
            rows[k : k + 2], *paste(images, targets, two[0][0]["seed"]), strict=True
        ):
            tile = overlay(image, target["masks"], target["labels"], names)
            row["after copy-paste"] = (tile, "")
    grid([list(row.values()) for row in rows], list(rows[0]), path)


def detections(
    image: Tensor, instances: list[dict], names: list[str], side: int = TILE
) -> Image.Image:
    """The picture of one image's detections.

    Args:
        image: (3, H, W) uint8.
        instances: of `ap.detect_instances`; or the ground truth in the same form,
            without scores.
        names: class names.
        side: long side of the picture, pixels.
    """
    # Reduced before it is drawn on: a photograph's own masks would be gigabytes.
    limit = min(side, max(image.shape[-2:]))
    small = augment.resize(image, limit, limit).float() / 255
    masks = torch.zeros(len(instances), *small.shape[-2:], dtype=torch.bool)
    for mask, instance in zip(masks, instances, strict=True):
        whole = torch.from_numpy(mask_utils.decode(instance["segmentation"]))
        mask[:] = augment.resize_masks(whole[None], small)[0] > 0
    labels = torch.tensor([instance["category_id"] for instance in instances])
    scores = [instance["score"] for instance in instances if "score" in instance]
    scores = torch.tensor(scores) if len(scores) == len(instances) > 0 else None
    return overlay(small, masks, labels, names, scores, side)


def predictions(
    dataset, results: dict[int, list[dict]], indices: list[int], path, notes=None
) -> None:
    """Write a picture: the detections in some images, beside the ground truth.

    Args:
        dataset: a `datasets.dataset.Dataset`.
        results: image -> its COCO results, of `ap.predictions`.
        indices: the images.
        path: the file.
        notes: a line for each image, or None.
    """
    rows = []
    for index, note in zip(indices, notes or [""] * len(indices), strict=True):
        image = dataset.image(index)
        sure = [result for result in results.get(index, []) if result["score"] > 0.5]
        rles = zip(dataset.rles(index), dataset.annotations(index), strict=True)
        instances = [
            dict(segmentation=rle, category_id=label)
            for rle, (label, crowd) in rles
            if not crowd
        ]
        tile = detections(image, sure, dataset.names)
        rows.append([(tile, note), (detections(image, instances, dataset.names), "")])
    grid(rows, ["prediction, score > 0.5", "ground truth"], path)
