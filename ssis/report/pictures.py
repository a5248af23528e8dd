r"""Pictures: pseudo-labels, predictions.

A number says how many pseudo-labels are right; a picture says what is wrong with the
others. Every evaluation writes `pseudo_<step>.png`, a strip for each of some
unlabeled images: the image, all that the teacher predicts, what the filter keeps, the
masks that SAM drew, the corrected classes, where the masks are unsure, the image after
copy-paste, and the truth that training never sees.
The end of a run writes `predictions.png` (the teacher on test images beside the truth),
`best.png` and `worst.png` (where it did best and worst).

Read next: `ssis/report/page.py`, which puts them on a page.
"""

import torch
from PIL import Image, ImageDraw
from pycocotools import mask as mask_utils
from torch import Tensor
from torch.nn import functional as F

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
        scores: (N,) in [0, 1], or None; the surest lies on top.
        side: long side of the picture, pixels.
    """
    # Enlarged or reduced first, masks by nearest neighbor: what the edge of a mask is
    # should be seen pixel by pixel.
    scale = side / max(image.shape[-2:])
    size = [round(side * scale) for side in image.shape[-2:]]
    pixels = F.interpolate(image.cpu()[None], size)[0]
    pen_size = max(10, side // 60)
    texts = []
    # Of several classes for one object the surest is drawn last, over the others.
    order = range(len(labels)) if scores is None else scores.argsort().tolist()
    for k in order:
        label = int(labels[k])
        # One at a time: a hundred masks of a large picture would be gigabytes.
        mask = F.interpolate(masks[k].cpu().float()[None, None], size)[0, 0]
        color = torch.tensor(COLORS[(label - 1) % len(COLORS)])[:, None, None] / 255
        # A line two pixels wide inside the edge: the mask less what is still in it two
        # pixels further in all four directions.
        padded = F.pad(mask, (2, 2, 2, 2)) > 0
        inner = (
            padded[2:-2, 4:] & padded[2:-2, :-4] & padded[4:, 2:-2] & padded[:-4, 2:-2]
        )
        inner = inner & (mask > 0)
        alpha = 0.35 * mask + 0.65 * (mask - inner.float())
        pixels = pixels * (1 - alpha) + color * alpha
        ys, xs = torch.where(mask > 0)
        if len(ys):
            score = "" if scores is None else f" {scores[k]:.2f}"
            at = (xs.min().item(), max(0, ys.min().item() - pen_size - 1))
            texts.append((at, names[label - 1] + score))
    array = (pixels * 255).to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(array)
    pen = ImageDraw.Draw(picture)
    # In a crowd the names would hide what they name.
    for at, text in texts if len(texts) <= side // 20 else []:
        style = dict(fill="white", stroke_width=2, stroke_fill="black")
        pen.text(at, text, font_size=pen_size, **style)
    return picture


def grid(rows: list[list[Image.Image]], titles: list[str]) -> Image.Image:
    """Pictures in rows under column titles."""
    gap, head = 6, 22
    height = max(picture.height for row in rows for picture in row) + gap
    sheet = Image.new(
        "RGB", ((TILE + gap) * len(titles), head + height * len(rows)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((column * (TILE + gap) + 4, 4), title, fill="black", font_size=13)
        for number, row in enumerate(rows):
            sheet.paste(row[column], (column * (TILE + gap), head + number * height))
    return sheet


def uncertainty(image: Tensor, mask_probs: Tensor) -> Image.Image:
    """Where the masks are unsure: u of PL-DC Eq. (uncertainty), black to red.

    Args:
        image: (3, H, W) float in [0, 1], shown darkly underneath.
        mask_probs: (N, H, W) in [0, 1]; of overlapping instances the least sure counts.
    """
    doubt = (1 - losses.certainty(mask_probs.cpu())).amax(0) if len(mask_probs) else 0
    shown = 0.25 * image.cpu().mean(0, keepdim=True).repeat(3, 1, 1)
    shown[0] = shown[0] + doubt * (1 - shown[0])
    nothing = torch.zeros(0, *image.shape[-2:])
    return overlay(shown, nothing, nothing, [])


def caption(picture: Image.Image, text: str) -> Image.Image:
    """The picture with a line of text at its lower edge."""
    at = (4, picture.height - 14)
    pen = ImageDraw.Draw(picture)
    pen.text(at, text, fill="white", stroke_width=2, stroke_fill="black")
    return picture


def mask_iou(pseudo, item: dict, names: list[str]) -> str:
    """ "mask IoU 0.81", the mean over what lies on an instance; "" without truth."""
    if "target" not in item:
        return ""
    sums = audit.tally(pseudo, item["target"], len(names)).sum(dim=0)
    if not sums[audit.MATCHED]:
        return ""
    return f"mask IoU {sums[audit.IOU] / sums[audit.MATCHED]:.2f}"


def pasted(results: list[tuple], config) -> list[tuple]:
    """Images and targets after ARP, each image with the next one; see `augment.arp`.

    Args:
        results: image, target, seed.
        config: of `augment.arp`.
    """
    made = []
    for k in range(0, len(results), 2):
        images, targets, seeds = zip(*results[k : k + 2], strict=True)
        moved = [{key: t.cpu() for key, t in target.items()} for target in targets]
        made += zip(*augment.arp(images, moved, config, seeds[0]), strict=True)
    return made


# What a stage of `train.pseudo_labels` is called above its pictures.
TITLES = dict(
    predicted="predicted by the teacher",
    kept="kept by the filter",
    refined="masks redrawn by SAM",
    corrected="classes corrected",
    oracle="replaced by the truth",
)


def pseudo_labels(run, label, streams, folder, step: int) -> None:
    """Write `pseudo_<step>.png` for the first unlabeled images; rank 0 only.

    Args:
        run: `run.Run`.
        label: `train.pseudo_labels`.
        streams: `data.Streams`; without known truth the last column is left out.
        folder: the run's.
        step: steps done, for the name of the file.
    """
    if run.rank:
        return
    stream = streams.audit or streams.unlabeled
    names = stream.dataset.names
    rows = []
    results = []
    for k in range(min(ROWS, len(stream.indices))):
        item = stream[k]
        image = item["image"]
        stages = label(run, [image.to(run.device)], [item], audit.PREDICTED)
        nothing = torch.zeros(0, *image.shape[-2:])
        row = {"unlabeled image": overlay(image, nothing, nothing, names)}
        for stage, title in TITLES.items():
            if stage in stages:
                p = stages[stage][0]
                tile = overlay(image, p.masks, p.labels, names, p.class_quality)
                row[title] = caption(tile, mask_iou(p, item, names))
        if run.config.uncertainty:
            row["uncertainty"] = uncertainty(image, stages["final"][0].mask_probs)
        if run.config.arp != "none":
            # Its place among the columns; the picture needs the next image too.
            row["after copy-paste"] = None
        if "target" in item:
            truth = item["target"]
            row["truth (never seen)"] = overlay(
                image, truth["masks"], truth["labels"], names
            )
        rows.append(row)
        results.append((image, stages["final"][0].target(), item["seed"]))
    if run.config.arp != "none":
        for k, (image, labels) in enumerate(pasted(results, run.config)):
            tile = overlay(image, labels["masks"], labels["labels"], names)
            rows[k]["after copy-paste"] = tile
    path = folder / f"pseudo_{step:06d}.png"
    with writing(path):
        grid([list(row.values()) for row in rows], list(rows[0])).save(path)


def detections(
    image: Tensor, found: list[dict], names: list[str], side: int = TILE
) -> Image.Image:
    """The picture of one image's detections.

    Args:
        image: (3, H, W) uint8.
        found: of `ap.detect`; or the truth in the same form, without scores.
        names: class names.
        side: long side of the picture, pixels.
    """
    # Reduced before it is drawn on: a photograph's own masks would be gigabytes.
    limit = min(side, max(image.shape[-2:]))
    small = augment.resize(image, limit, limit).float() / 255
    masks = torch.zeros(len(found), *small.shape[-2:], dtype=torch.bool)
    for mask, instance in zip(masks, found, strict=True):
        whole = torch.from_numpy(mask_utils.decode(instance["segmentation"]))
        mask[:] = augment.resize_masks(whole[None], small)[0] > 0
    labels = torch.tensor([instance["category_id"] for instance in found])
    scores = [instance["score"] for instance in found if "score" in instance]
    scores = torch.tensor(scores) if len(scores) == len(found) > 0 else None
    return overlay(small, masks, labels, names, scores, side)


def predictions(
    dataset, found: dict[int, list[dict]], indices: list[int], path, note=None
) -> None:
    """Write a picture: what was found in some images, beside the truth.

    Args:
        dataset: a `data.Dataset`.
        found: image -> its COCO results, of `ap.predictions`.
        indices: the images.
        path: the file.
        note: a line for each image, or None.
    """
    rows = []
    for row, index in enumerate(indices):
        image = dataset.image(index)
        seen = [f for f in found.get(index, []) if f["score"] > 0.5]
        rles = zip(dataset.rles(index), dataset.annotations(index), strict=True)
        truth = [
            dict(segmentation=rle, category_id=label)
            for rle, (label, crowd) in rles
            if not crowd
        ]
        tile = detections(image, seen, dataset.names)
        if note:
            tile = caption(tile, note[row])
        rows.append([tile, detections(image, truth, dataset.names)])
    with writing(path):
        grid(rows, ["prediction, score > 0.5", "truth"]).save(path)
