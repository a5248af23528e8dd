r"""COCO mask and box AP of a model, per class.

The numbers are pycocotools' own (or faster-coco-eval's, which are the same), all twelve
of them, for masks and for boxes. Three details keep them right:

* mask results carry no box, since pycocotools would take their area from it and file
  them under the wrong size;
* masks are pasted without torchvision's shift of half a pixel (`inference.paste`);
* each image is evaluated exactly once over all processes (a sampler that pads to
  equal parts counts some images twice).

Read next: `ssis/report/audit.py`, the same question about pseudo-labels.
"""

import contextlib
import ctypes
import io
import json
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from tqdm import tqdm

from ssis import UserError, augment, distributed, inference
from ssis.datasets import rle


# COCOeval's twelve numbers, in its order.
NUMBERS = (
    "AP",
    "AP50",
    "AP75",
    "APs",
    "APm",
    "APl",
    "AR1",
    "AR10",
    "AR100",
    "ARs",
    "ARm",
    "ARl",
)


# Images in a batch; detections of an image and class that COCO counts.
BATCH, USUAL = 8, 100


@torch.no_grad()
def predictions(
    net, dataset, indices: list[int], device, batch: int = BATCH, progress: bool = False
) -> list[dict]:
    """A model's detections in some images, as COCO results in the original frame.

    Args:
        net: a `model.MaskRCNN` in evaluation mode.
        dataset: a `datasets.dataset.Dataset`.
        indices: the images.
        device: of the model.
        batch: images at a time.
        progress: draw a bar.

    Returns:
        Dicts with image_id (the index), category_id (the label), score, bbox (xywh) and
        segmentation (compressed RLE, counts as str).
    """
    results = []
    for start in tqdm(
        range(0, len(indices), batch), disable=not progress, unit="batch"
    ):
        part = indices[start : start + batch]
        images = [dataset.image(i) for i in part]
        detections = detect_instances(net, images, device)
        for index, instances in zip(part, detections, strict=True):
            results += [dict(image_id=int(index), **instance) for instance in instances]
    return results


@torch.no_grad()
def detect_instances(
    net, images: list[Tensor], device, min_score: float | None = None
) -> list[list[dict]]:
    """A model's detections in images of any size, in their own frames.

    Args:
        net: a `model.MaskRCNN` in evaluation mode.
        images: (3, H, W) uint8 each.
        device: of the model.
        min_score: lowest score of a detection; None: the model's own, for AP.

    Returns:
        For each image, best first, dicts with category_id (the label), score, bbox
        (xywh) and segmentation (compressed RLE, counts as str).
    """
    # The sizes that the model was built for; the resizing of training.
    short, longest = net.transform.min_size[-1], net.transform.max_size
    views = [augment.resize(x, short, longest).to(device).float() / 255 for x in images]
    if min_score is None:
        min_score = net.roi_heads.score_thresh
    outputs = inference.detect(net, views, min_score)
    results = []
    for image, view, output in zip(images, views, outputs, strict=True):
        frame = tuple(image.shape[-2:])
        # From the view back to the original frame.
        down, across = (a / b for a, b in zip(frame, view.shape[-2:], strict=True))
        # On the CPU: a GPU would be asked for each of a hundred small masks.
        boxes = output.boxes.cpu() * torch.tensor([across, down, across, down])
        half = 0.5 * down, 0.5 * across
        rles = encode(output.masks.cpu(), boxes, frame, half)
        boxes[:, 2:] -= boxes[:, :2]
        columns = (output.labels.tolist(), output.scores.tolist(), boxes.tolist(), rles)
        names = ("category_id", "score", "bbox", "segmentation")
        results.append(
            [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        )
    return results


def encode(
    masks: Tensor,
    boxes: Tensor,
    frame: tuple[int, int],
    shift: tuple[float, float],
) -> list[dict]:
    """Masks of the mask head as RLEs in a frame; arguments as for `inference.paste`.

    One at a time: a hundred detections in a photograph of 12 megapixels would be
    gigabytes of soft masks, and as RLEs they are kilobytes.
    """
    rles = []
    for rows, columns, soft in inference.paste_parts(masks, boxes, frame, shift):
        # Fortran order is what pycocotools reads without copying.
        whole = np.zeros(frame, np.uint8, order="F")
        whole[rows, columns] = (soft > 0.5).cpu().numpy()
        rles.append(rle.encode(whole))
    return rles


def evaluator() -> tuple:
    """The classes `COCO` and `COCOeval`: faster-coco-eval's where it is installed.

    Its numbers are pycocotools', in a third of the time (docs/performance.md).
    """
    try:
        import faster_coco_eval as fast
    except ImportError:
        return COCO, COCOeval
    return fast.COCO, fast.COCOeval_faster


def average_precision(
    ground_truth: COCO, results: list[dict], kind: str, limit: int = USUAL
) -> tuple[dict, list]:
    """COCO's twelve numbers and the AP of each class, in percent.

    Args:
        ground_truth: of `Dataset.coco`, with category ids 1..C.
        results: of `predictions`.
        kind: "segm", "bbox", or "boundary", which needs faster-coco-eval: boundary AP
            (Cheng et al., CVPR 2021), how well the outlines fit. In the place of the
            mask IoU it has min(mask IoU, boundary IoU), where the boundary of a mask
            is what lies within 2 % of the image diagonal of its outline. A large
            object's mask IoU hardly notices a ragged outline; this does.
        limit: detections of an image and class that count, 100 at least. With more than
            COCO's, which would cut off what a crowded image holds, COCO's is there as
            "AP@100".

    Returns:
        {"AP": .., .., "ARl": ..} and a list of C numbers; None where the ground truth
        has no instance.
    """
    limit = max(limit, USUAL)
    coco, coco_eval = evaluator()
    place = "bbox" if kind == "bbox" else "segmentation"
    keys = ("image_id", "category_id", "score", place)
    # Both packages print as they go.
    with contextlib.redirect_stdout(io.StringIO()):
        truth, detections = coco(), coco()
        # Both packages write into the annotations that they are given.
        annotations = [dict(a) for a in ground_truth.dataset["annotations"]]
        truth.dataset = dict(ground_truth.dataset, annotations=annotations)
        truth.createIndex()
        if results:
            detections = truth.loadRes([{key: r[key] for key in keys} for r in results])
        else:
            # loadRes([]) is an IndexError; no detection is a legal answer.
            detections.dataset = dict(truth.dataset, annotations=[])
            detections.createIndex()
        # Without detections every kind of AP is the same: 0, or none.
        found = coco_eval(truth, detections, kind if results else "segm")
        found.params.maxDets = [1, 10, limit]
        found.evaluate()
        found.accumulate()
        found.summarize()
    # Precision is (IoU, recall, class, area, detections); all areas, all detections.
    precision = found.eval["precision"][:, :, :, 0, -1]
    classes = [mean(p) for p in precision.transpose(2, 0, 1)]
    # Theirs has further ones after COCO's.
    values = map(percent, found.stats[: len(NUMBERS)])
    numbers = dict(zip(NUMBERS, values, strict=True))
    if limit != USUAL:
        # `summarize` looks for 100 detections in its first line, whatever the limit.
        numbers["AP"] = mean(precision)
        usual, _ = average_precision(ground_truth, results, kind)
        numbers["AP@100"] = usual["AP"]
        numbers = {
            f"AR{limit}" if name == "AR100" else name: value
            for name, value in numbers.items()
        }
    return numbers, classes


def mean(precision: np.ndarray) -> float | None:
    """AP in percent of pycocotools' precisions, in which -1 means "no instance"."""
    known = precision[precision > -1]
    return percent(known.mean() if known.size else -1)


def percent(value: float) -> float | None:
    """A fraction in percent; None for pycocotools' -1, "no instance"."""
    return None if value < 0 else round(100 * float(value), 3)


def give_back_memory() -> None:
    """Give what an evaluation has freed back to the operating system.

    The C library keeps freed blocks for later. An evaluation's are of all sizes, with
    small ones in use between them, so the next evaluation finds no room in them and
    takes new memory: without this call a run of 14,700 steps grew from 1.2 to 2.0 GB
    (docs/log.md). Only Linux's usual C library, glibc, has the call.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def evaluate(
    net, dataset, device, rank: int = 0, world_size: int = 1, progress: bool = False
):
    """Mask and box AP of a model on a whole dataset, over all processes.

    Every process must call this. On a CPU the numbers are, bit for bit, those of a
    single process.

    Args:
        net: a `model.MaskRCNN`; its mode, training or evaluation, is restored.
        dataset: a `datasets.dataset.Dataset`.
        device: of the model.
        rank: this process.
        world_size: number of processes.
        progress: draw a bar, on the first process.

    Returns:
        ({"mask": numbers, "box": numbers, "mask_per_class": {name: AP},
        "box_per_class": the same}, results); equal on every process.
    """
    # Whole batches are distributed, not images: detections at the edge of an image
    # depend a little on the padding, and so on the other images of the batch.
    mine = [i for i in range(len(dataset)) if i // BATCH % world_size == rank]
    mode = net.training
    part = predictions(
        net.eval(), dataset, mine, device, progress=progress and rank == 0
    )
    results = [result for each in distributed.gather(part) for result in each]
    # In image order, whatever the number of processes: AP breaks ties by position.
    results.sort(key=lambda result: result["image_id"])
    # Once, not in every process.
    limit = net.roi_heads.detections_per_img
    report = distributed.from_main(numbers_of, dataset, results, limit)
    net.train(mode)
    give_back_memory()
    return report, results


def numbers_of(dataset, results: list[dict], limit: int) -> dict:
    """The report of `evaluate`: masks and boxes, of all classes and of each.

    Args:
        dataset, results: as there.
        limit: detections of an image and class that count, as many as the model gives.
    """
    report, truth = {}, dataset.coco(range(len(dataset)))
    for name, kind in (("mask", "segm"), ("box", "bbox")):
        report[name], classes = average_precision(truth, results, kind, limit)
        report[f"{name}_per_class"] = dict(zip(dataset.names, classes, strict=True))
    return report


def save_predictions(path: Path, dataset, results: list[dict]) -> Path:
    """Write COCO results files with the dataset's own image and category ids.

    `path` gets the masks, and a second file beside it the boxes: in one file
    pycocotools would take the masks' areas from the boxes.

    Returns:
        The path of the second file.
    """
    boxes = path.with_name(f"{path.stem}_boxes.json")
    for target, key in ((path, "segmentation"), (boxes, "bbox")):
        lines = [
            {
                "image_id": dataset.image_ids[r["image_id"]],
                "category_id": dataset.category_ids[r["category_id"] - 1],
                "score": r["score"],
                key: r[key],
            }
            for r in results
            # A class of the training set that this dataset does not have has no id.
            if dataset.category_ids[r["category_id"] - 1] is not None
        ]
        try:
            target.write_text(json.dumps(lines))
        except OSError as error:
            raise UserError(
                f"{target}: cannot be written ({error.strerror})"
            ) from error
    return boxes
