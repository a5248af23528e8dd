r"""torchvision's inference, written out: boxes, class distributions, soft masks.

The methods need what torchvision throws away: the whole class distribution, and masks
before they are made hard.

    images -> features -> proposals (RPN)
           -> class distribution and box of each proposal -> detections (NMS)
           -> mask, 28 x 28 cells of each detection's box -> pasted into the image

A test compares it with torchvision's own. One step differs on purpose, `paste`:
torchvision's masks are shifted by about half a pixel. In one prediction nobody sees it,
but the shift adds up when a student learns from such masks and becomes a teacher.

*Mixed precision.* With `--amp`, backbone and heads run in 16 bits (autocast, in
`train.py`). What follows them is float32: class probabilities, boxes in pixels, NMS,
and mask probabilities. bf16 has 8 significant bits, so a coordinate of 1,000 would be
rounded to a multiple of 4, and a probability of 0.9 by up to 0.002, which is enough to
move it across a threshold. `Tensor.float` marks the border.

Chain: 8 of 24. Read next: `ssis/teacher.py`, which makes pseudo-labels of it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms, clip_boxes_to_image

from ssis.model import MaskRCNN

# Cells on a side of the feature map that is kept of each instance.
CELLS = 7


class Detections(NamedTuple):
    """The network's detections in one image, in the image's frame.

    boxes (N, 4), labels (N,), scores (N,), distributions (N, C), features
    (N, D, 7, 7), mask_logits (N, 1, 28, 28) as in `teacher.PseudoLabels`; masks
    (N, 1, 28, 28) float32 in [0, 1], their sigmoid.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    distributions: Tensor
    features: Tensor
    mask_logits: Tensor
    masks: Tensor


@torch.no_grad()
def detect(model: MaskRCNN, images: list[Tensor], min_score: float) -> list[Detections]:
    """torchvision's inference without its resizing and pasting.

    Args:
        model: in evaluation mode.
        images: (3, H, W) float in [0, 1] each, of any sizes.
        min_score: class probability below which a detection is dropped.

    Returns:
        `Detections` of each image.
    """
    # The model's own preparation without the resizing: normalized, padded to one size.
    # The sizes before padding are kept, since no box may lie in the padding.
    roi = model.roi_heads
    sizes = [tuple(image.shape[-2:]) for image in images]
    normal = [model.transform.normalize(image) for image in images]
    batch = model.transform.batch_images(normal)
    # First stage: boxes that may hold an object of any class, the best of each image.
    features = model.backbone(batch)
    proposals, _ = model.rpn(ImageList(batch, sizes), features)
    # Second stage, for every proposal: C + 1 logits, and a box for each class, since
    # the best box depends on the class.
    box_features = roi.box_head(roi.box_roi_pool(features, proposals, sizes))
    logits, regression = roi.box_predictor(box_features)
    # The whole distribution is kept: PL-DC's correction mixes it with another one, and
    # P of the label is the class quality c of PL-DC Eq. (quality). From here on
    # all is float32, also under mixed precision.
    probs = logits.float().softmax(dim=-1)  # (proposals of all images, C + 1)
    # The regression is relative to the proposal; decoded it is a box in pixels.
    boxes = roi.box_coder.decode(regression.float(), proposals)  # (.., C + 1, 4)
    # The proposals of all images are in one tensor, in order; here they are separated.
    counts = [len(p) for p in proposals]
    selected = [
        select_detections(b, p, size, min_score, roi.nms_thresh, roi.detections_per_img)
        for b, p, size in zip(
            boxes.split(counts), probs.split(counts), sizes, strict=True
        )
    ]
    # A mask for each remaining box: the mask head gives one for every class, and that
    # of the label is kept.
    kept_boxes, labels = [s[0] for s in selected], [s[1] for s in selected]
    pooled = roi.mask_roi_pool(features, kept_boxes, sizes)  # (N of all, D, 14, 14)
    logits = roi.mask_predictor(roi.mask_head(pooled)).float()  # (N of all, C + 1, ..)
    own = torch.cat(labels)
    logits = logits[torch.arange(len(own), device=own.device), own][:, None]
    # The mask head's input, reduced to 7 x 7 cells, is kept for the category
    # classifier: the prototypes need no forward pass of their own.
    small = F.adaptive_avg_pool2d(pooled.float(), CELLS)
    counts = [len(boxes) for boxes in kept_boxes]
    parts = zip(selected, small.split(counts), logits.split(counts), strict=True)
    return [Detections(*s, cells, mask, mask.sigmoid()) for s, cells, mask in parts]


@torch.no_grad()
def features_in(
    model: MaskRCNN, images: list[Tensor], boxes: list[Tensor]
) -> list[Tensor]:
    """The feature maps in given boxes, as `detect` has them for its own.

    Args:
        model: in evaluation mode.
        images: B images (3, H, W) float in [0, 1].
        boxes: (N, 4) in the frame of each.

    Returns:
        (N, D, 7, 7) for each image.
    """
    # The boxes are given (the prototypes remember labeled instances), so only backbone
    # and pooling of `detect` are needed.
    sizes = [tuple(image.shape[-2:]) for image in images]
    normal = [model.transform.normalize(image) for image in images]
    features = model.backbone(model.transform.batch_images(normal))
    # The same pooling and the same average as there: the two are to be compared.
    pooled = model.roi_heads.mask_roi_pool(features, boxes, sizes)
    small = F.adaptive_avg_pool2d(pooled.float(), CELLS)
    return list(small.split([len(part) for part in boxes]))


def select_detections(
    boxes: Tensor,
    probs: Tensor,
    size: tuple[int, int],
    min_score: float,
    nms_iou: float,
    limit: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Proposals of one image into detections, by torchvision's rules.

    Args:
        boxes: (P, C + 1, 4) one box per proposal and class.
        probs: (P, C + 1) softmax, column 0 is background.
        size: height and width to clip to.
        min_score, nms_iou, limit: of torchvision's `postprocess_detections`.

    Returns:
        boxes (N, 4), labels (N,), scores (N,), distributions (N, C), best first.
    """
    # Regression may lead out of the image, where there is nothing.
    boxes = clip_boxes_to_image(boxes, size)
    # Each pair of proposal and class above the threshold is a candidate. The threshold
    # may come before NMS, because a box is only ever suppressed by a better one.
    # A box without area would make the student's loss raise. A hundredth of a pixel is
    # torchvision's own limit.
    big = (boxes[:, :, 2:] - boxes[:, :, :2]).amin(dim=2) >= 1e-2  # (P, C + 1)
    row, column = torch.where((probs[:, 1:] > min_score) & big[:, 1:])
    candidates, scores = boxes[row, column + 1], probs[row, column + 1]
    # Non-maximum suppression within each class: of two boxes that overlap, the better
    # one stays. Boxes of different classes do not compete, so one object may be
    # detected twice.
    keep = batched_nms(candidates, scores, column, nms_iou)[:limit]
    # Column k of the classes is label k + 1, since label 0 is background.
    return candidates[keep], column[keep] + 1, scores[keep], probs[row[keep], 1:]


def paste(
    small: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    shift: tuple[float, float] = (0.5, 0.5),
) -> Tensor:
    """Masks of the mask head, put into their boxes in a frame.

    torchvision makes the training target of the mask head with an RoIAlign that takes a
    pixel's value to be at its corner, not its center (`aligned=False`). So the mask
    head learns masks that lie half a pixel up and left. `shift` corrects this.
    torchvision's own `paste_masks_in_image` does not, and also rounds boxes to whole
    pixels. If discs of 12 to 36 pixels are made targets and pasted again, their IoU
    with the original discs is 0.91 with torchvision's paste and 0.96 with this one.

    Args:
        small: (N, 1, M, M) float in [0, 1]; M = 28.
        boxes: (N, 4) in the frame.
        size: height and width of the frame.
        shift: half a pixel of the frame that the model saw, in pixels of this frame:
            down and across.

    Returns:
        (N, H, W) float32 in [0, 1], 0 outside the boxes.
    """
    # A whole frame for each instance: a hundred in a photograph are gigabytes.
    # Evaluation does not need them all at once, and uses `paste_parts` instead.
    pasted = small.new_zeros(len(small), *size)
    for whole, (rows, columns, soft) in zip(
        pasted, paste_parts(small, boxes, size, shift), strict=True
    ):
        whole[rows, columns] = soft
    return pasted


def paste_parts(
    small: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    shift: tuple[float, float] = (0.5, 0.5),
) -> Iterator[tuple[slice, slice, Tensor]]:
    """`paste`, one mask at a time and within its box alone.

    A box is a small part of a photograph, and only its pixels cost work and memory
    (docs/performance.md).

    Args:
        small: (N, 1, M, M) float in [0, 1].
        boxes: (N, 4) in the frame.
        size: height and width of the frame.
        shift: as for `paste`.

    Yields:
        The rows and the columns of the frame that a box touches, and its mask there.
    """
    height, width = size
    boxes = boxes.float()
    x1, y1, x2, y2 = boxes[:, :, None].unbind(dim=1)  # (N, 1) each
    # Pixel centers of the frame, and where they lie in each box: -1 is its left end, 1
    # its right one, as `grid_sample` counts.
    x = torch.arange(width, device=boxes.device) + 0.5
    y = torch.arange(height, device=boxes.device) + 0.5
    across = 2 * (x - shift[1] - x1) / (x2 - x1) - 1  # (N, W)
    down = 2 * (y - shift[0] - y1) / (y2 - y1) - 1  # (N, H)
    # A pixel whose center is outside of the box is 0, whatever is sampled.
    within = (x >= x1) & (x <= x2), (y >= y1) & (y <= y2)
    # The whole pixels that a box touches, cut at the frame; none for a box outside.
    spans = torch.cat([boxes[:, :2].floor(), boxes[:, 2:].ceil()], dim=1)
    spans = clip_boxes_to_image(spans, size).int().tolist()
    for n, (left, top, right, bottom) in enumerate(spans):
        columns, rows = slice(left, right), slice(top, bottom)
        grid = torch.broadcast_tensors(across[n, columns], down[n, rows, None])
        grid = torch.stack(grid, dim=2)  # (h, w, 2)
        # Bilinear between the centers of the 28 x 28 cells; beyond the outermost
        # centers the outermost value, for a mask does not fade towards the edge of its
        # box.
        soft = small.new_zeros(grid.shape[:2])
        if soft.numel():
            soft = F.grid_sample(
                small[n : n + 1], grid[None], padding_mode="border", align_corners=False
            )[0, 0]
        # For a large box the grid is gigabytes: freed before the next one is made.
        del grid
        yield rows, columns, soft * (within[0][n, columns] & within[1][n, rows, None])
