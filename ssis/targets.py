r"""Targets: boxes, labels and masks of an image, and who is matched with whom.

*Targets* are torchvision's dicts: `boxes` (N, 4) float32, xyxy in absolute pixels with
`x2 > x1` and `y2 > y1`; `labels` (N,) int64, 1..C, since 0 is background; `masks`
(N, H, W) uint8. A box is the box of its mask; a pseudo-label has the predicted box,
until SAM or pasting changes its mask. Targets made of pseudo-labels may have
`mask_weights` (N, H, W) float in [0, 1] as well.

Chain: 3 of 24. Read next: `ssis/augment.py`, the views of an image.
"""

import torch
from torch import Tensor
from torchvision.ops import box_iou

# A detection lies on an instance from this box IoU on, as in COCO's AP50.
MATCH_IOU = 0.5


def boxes_of(masks: Tensor) -> Tensor:
    """Boxes (N, 4) float32 of masks (N, H, W), none of which may be empty.

    A box ends after its last pixel; torchvision's `masks_to_boxes` names the last one
    itself, which is degenerate for a mask one pixel wide. (It also lists the pixels of
    every mask, which takes six times as long: docs/performance.md.)
    """
    # The columns and rows in which a mask has a pixel: looking along one side answers
    # for the other.
    across, down = (masks.amax(dim=k).ne(0).int() for k in (1, 2))  # (N, W), (N, H)
    # `argmax` gives the first of several largest values, so the first such column; of
    # the reversed row it gives the last one, counted from the other end.
    left, top = across.argmax(dim=1), down.argmax(dim=1)
    right = masks.shape[2] - across.flip(1).argmax(dim=1)
    bottom = masks.shape[1] - down.flip(1).argmax(dim=1)
    return torch.stack([left, top, right, bottom], dim=1).float()


def mask_iou(masks: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of masks, pair by pair.

    Args:
        masks: (.., H, W) bool.
        other: (.., H, W) bool; the leading dimensions are broadcast.

    Returns:
        (..) in [0, 1]; 0 where both are empty.
    """
    # Pixels of both over pixels of either. Not over those of one of them: a mask that
    # covers the whole image would then agree with everything.
    both = (masks & other).flatten(-2).sum(dim=-1)
    return both / (masks | other).flatten(-2).sum(dim=-1).clamp(min=1)


def match(boxes: Tensor, ground_truth: Tensor) -> Tensor:
    """One-to-one matching by box IoU, in the order of `boxes`.

    Args:
        boxes: (N, 4), best first.
        ground_truth: (M, 4).

    Returns:
        (N,) int64: index of the matched instance, -1 for none.
    """
    result = torch.full((len(boxes),), -1)
    if len(boxes) == 0 or len(ground_truth) == 0:
        return result
    iou = box_iou(boxes.cpu(), ground_truth.cpu())  # (N, M)
    for i in range(len(boxes)):
        best = iou[i].argmax()
        if iou[i, best] >= MATCH_IOU:
            result[i] = best
            # Taken: a second box on the same instance is a duplicate, hence wrong.
            iou[:, best] = -1
    return result


def instances(target: dict, keep: Tensor) -> dict:
    """The instances of a target that a bool mask (N,) selects; a new target."""
    # Once, not for each key: a GPU has to be waited for to know how many.
    index = keep.nonzero()[:, 0]
    return {key: value[index] for key, value in target.items()}


def sanitize(target: dict) -> dict:
    """Drop instances without pixels and derive the boxes again; a new target.

    Called after everything that moves or hides pixels: torchvision's Mask R-CNN raises
    on a degenerate box, and a box that is looser than its mask teaches the wrong thing.

    Args:
        target: `masks` (N, H, W) and other tensors of length N; not changed.
    """
    # The largest value of a mask: 0 if nothing of it is left.
    masks = target["masks"]
    keep = masks.amax(dim=2).amax(dim=1) != 0
    kept = instances(target, keep)
    # Boxes anew for all: a mask that has lost pixels has another box.
    return {**kept, "boxes": boxes_of(kept["masks"])}
