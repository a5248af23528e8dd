r"""Pictures: pseudo-labels, predictions, curves.

A number says how many pseudo-labels are right; a picture says what is wrong with the
others. Every evaluation writes `pseudo_<step>.png`, a strip for each of some
unlabelled images: the image, all that the teacher predicts, what the filter keeps, the
masks that SAM drew, the corrected classes, where the masks are unsure, the image after
copy-paste, and the truth that training never sees.
The end of a run writes `predictions.png` (the teacher on test images beside the truth)
and `curves.png`.

Read next: back to `train.py`.
"""

import matplotlib
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from ssis import audit, augment, losses, teacher

# No window: the pictures are files, also on a machine without a display.
matplotlib.use("Agg")
from matplotlib import pyplot as plt

from ssis.files import writing
from ssis.run_folder import read_metrics

# Colours that stay apart for colour-blind readers (Okabe and Ito, 2008), one by class.
COLOURS = [
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
        masks: (N, H, W) bool; labels: (N,), 1..C; scores: (N,) or None.
        names: class names.
        side: long side of the picture, pixels.
    """
    # Enlarged or reduced first, masks by nearest neighbour: what the edge of a mask is
    # should be seen pixel by pixel.
    scale = side / max(image.shape[-2:])
    size = [round(side * scale) for side in image.shape[-2:]]
    pixels = F.interpolate(image.cpu()[None], size)[0]
    pen_size = max(10, side // 60)
    texts = []
    for k, label in enumerate(labels.tolist()):
        # One at a time: a hundred masks of a large picture would be gigabytes.
        mask = F.interpolate(masks[k].cpu().float()[None, None], size)[0, 0]
        colour = torch.tensor(COLOURS[(label - 1) % len(COLOURS)])[:, None, None] / 255
        # A line two pixels wide inside the edge: the mask less what is still in it two
        # pixels further in all four directions.
        padded = F.pad(mask, (2, 2, 2, 2)) > 0
        inner = (
            padded[2:-2, 4:] & padded[2:-2, :-4] & padded[4:, 2:-2] & padded[:-4, 2:-2]
        )
        inner = inner & (mask > 0)
        alpha = 0.35 * mask + 0.65 * (mask - inner.float())
        pixels = pixels * (1 - alpha) + colour * alpha
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
    """Where the masks are unsure: u of PL-DC Eq. (PMUA), black to red.

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
    """Write `pseudo_<step>.png` for the first unlabelled images; rank 0 only.

    Args:
        run: `run.Run`.
        label: `train.pseudo_labels`.
        streams: `loader.Streams`; without known truth the last column is left out.
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
        row = {"unlabelled image": overlay(image, nothing, nothing, names)}
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


def predictions(run, dataset, folder) -> None:
    """Write `predictions.png`: what the final model finds in test images."""
    net = (run.net if run.config.method == "supervised" else run.teacher.module).eval()
    rows = []
    config = run.config
    for index in range(min(ROWS, len(dataset))):
        # In the frame that the model sees, as a photograph's own would be too large.
        image, truth = dataset.image(index), dataset.target(index)
        image = augment.resize(image, config.short_side, config.long_side).float() / 255
        masks = augment.resize_masks(truth["masks"], image)
        found = teacher.predict(net, [image.to(run.device)], 0.5)[0]
        names = dataset.names
        rows.append(
            [
                overlay(image, found.masks, found.labels, names, found.class_quality),
                overlay(image, masks, truth["labels"], names),
            ]
        )
    path = folder / "predictions.png"
    with writing(path):
        grid(rows, ["prediction, score > 0.5", "truth"]).save(path)


def curves(folder) -> None:
    """Write `curves.png` from `metrics.jsonl`: losses, validation AP, audit."""
    lines = read_metrics(folder / "metrics.jsonl")
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 3.6), layout="constrained"
    )
    for prefix in ("labeled", "unlabeled"):
        points = [
            (
                line["step"],
                sum(v for k, v in line.items() if k.startswith(prefix + "/")),
            )
            for line in lines
            if f"{prefix}/loss_mask" in line
        ]
        if points:
            left.plot(*zip(*points, strict=True), label=prefix)
    left.set(title="loss", xlabel="step")
    for who in ("student", "teacher"):
        key = f"val_mask_ap_{who}"
        points = [
            (line["step"], line[key]) for line in lines if line.get(key) is not None
        ]
        if points:
            middle.plot(*zip(*points, strict=True), marker="o", label=who)
    middle.set(title="validation mask AP, %", xlabel="step")
    audits = [(line["step"], line["audit"]) for line in lines if line.get("audit")]
    for key in ("box_precision", "class_accuracy", "mask_iou", "recall"):
        points = [
            (step, audit[key]) for step, audit in audits if audit[key] is not None
        ]
        if points:
            right.plot(
                *zip(*points, strict=True), marker="o", label=key.replace("_", " ")
            )
    right.set(title="audit of the pseudo-labels", xlabel="step", ylim=(0, 1))
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend()
    with writing(folder / "curves.png"):
        figure.savefig(folder / "curves.png", dpi=110)
    plt.close(figure)
