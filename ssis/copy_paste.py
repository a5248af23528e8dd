r"""S4M: copy-paste of refined pseudo-labels (ARP).

*ARP* (S4M, augmentation with refined pseudo-labels) comes between the weak and the
strong view: the instances of one image are pasted onto another, and the other way
round. This makes occlusions, new backgrounds and crowds, which are rare in a few
labeled images. If the masks are loose, the student learns to find pasted borders of
background (in S4M's ablation ARP then hurts); with masks redrawn by SAM it helps. On
the built-in shapes it helps either way (docs/results.md). Labeled images can be pasted
into each other in the same way (`--arp labeled`), as an augmentation that every method
can have.

    pairs       max(1, B // 4) disjoint pairs of the batch's images, both directions
    what        every instance of at least `arp_min_area` of the image that it is pasted
                onto (S4M: 3000 pixels of a crop of 1024 x 1024)
    where       at its own coordinates, centers of the images on each other; with
                `arp_jitter`, as S4M on COCO, each instance by itself at a random place
                and a random scale (0.8 to 1.2)
    how         in M, the union of the pasted instances, their pixels replace those
                below; elsewhere the image stays as it was:

$$x = M \odot x_{\mathrm{above}} + (1 - M) \odot x_{\mathrm{below}}$$ S4M Eq. (ARP)

    occlusion   pasted instances hide what was there, and nothing else does: a tie
                stays on its shirt. Only with `arp_jitter`, where each has a new place,
                do they hide each other, and the best pseudo-label is in front
    labels      masks lose what is hidden; boxes are those of the new masks; an instance
                of which less than a tenth is left is dropped

The pairs are made within one process, so with N processes they differ from one's. A
process with a single image has no pair, and the run is refused
(`engine.session.check_batches`).

Chain: 5 of 24. Read next: `ssis/model.py`, the network that sees the views.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ssis.augment import NEAREST_EXACT
from ssis.targets import boxes_of, instances, sanitize

# An instance of which less than this fraction is still visible is dropped.
VISIBLE = 0.1


def arp(
    images: list[Tensor],
    targets: list[dict],
    min_area: float,
    jitter: float,
    seed: int,
    crop: tuple[int, int] = (0, 0),
) -> tuple[list[Tensor], list[dict]]:
    """S4M's copy-paste among the images of a batch.

    Args:
        images: B of (3, H, W) float in [0, 1], of any sizes; not changed.
        targets: B dicts of boxes, labels, masks (N, H, W) uint8, and mask_weights
            (N, H, W) or not; best instance first. Not changed.
        min_area: smallest mask that is pasted, as a fraction of the image.
        jitter: 0: each instance is pasted at its own place; else at a random one,
            scaled by 1 - jitter to 1 + jitter.
        seed: of pairs, scales and places.
        crop: height and width that views are filled up to with `jitter`, as S4M's are:
            in a smaller one a pasted instance would cover all there is. (0, 0): no.

    Returns:
        Images and targets; those outside of the pairs are the same objects.
    """
    # A random order cut into pairs: each image is in one pair at most, so nothing is
    # pasted twice.
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator).tolist()
    # New lists, old tensors: an image that is in no pair stays the same object.
    made_images, made_targets = list(images), list(targets)
    # S4M: max(1, B // 4) pairs; no image is in two of them.
    for k in range(max(1, len(images) // 4) if len(images) > 1 else 0):
        a, b = order[2 * k : 2 * k + 2]
        # Both directions, each from the images as they were.
        for below, above in ((a, b), (b, a)):
            image, target = images[below], targets[below]
            if jitter and crop[0]:
                image, target = fill_up(image, target, crop)
            frame = image.shape[-2:]
            if jitter:
                # S4M measures an instance before it is scaled.
                source = largest(targets[above], min_area * frame[0] * frame[1])
                made = scatter(images[above], source, frame, jitter, generator)
            else:
                made = place(images[above], targets[above], frame)
                made = made[0], largest(made[1], min_area * frame[0] * frame[1])
            made_images[below], made_targets[below] = paste(image, target, *made)
    return made_images, made_targets


def fill_up(image: Tensor, target: dict, size: tuple[int, int]) -> tuple[Tensor, dict]:
    """A view with gray below and to the right, up to a size.

    Args:
        image, target: as for `place`.
        size: height and width, not less than the view's.
    """
    room = (0, size[1] - image.shape[-1], 0, size[0] - image.shape[-2])
    filled = dict(target, masks=pad(target["masks"], room))
    if "mask_weights" in target:
        # There is certainly no instance in the gray: its largest weight, as in `paste`.
        weights = target["mask_weights"]
        most = weights.amax(dim=(1, 2), keepdim=True)
        outside = pad(torch.zeros_like(weights), room, value=1.0).bool()
        filled["mask_weights"] = torch.where(outside, most, pad(weights, room))
    return pad(image, room, value=0.5), filled


def largest(target: dict, pixels: float) -> dict:
    """The instances of at least so many pixels: most of the tiny ones are wrong."""
    big = target["masks"].flatten(1).ne(0).sum(dim=1) >= pixels
    return instances(target, big)


def hide(masks: Tensor, seen: Tensor) -> Tensor:
    """Masks without what is hidden; empty where less than `VISIBLE` of one is left.

    Args:
        masks: (N, H, W) uint8.
        seen: (H, W) or (N, H, W) bool, where they can be seen.
    """
    left = masks * seen
    # A sliver of an instance is no good example of its class: it loses its last pixels.
    enough = left.flatten(1).sum(dim=1) >= VISIBLE * masks.flatten(1).sum(dim=1)
    return left * enough[:, None, None]


def place(image: Tensor, target: dict, frame: tuple[int, int]) -> tuple[Tensor, dict]:
    """An image and its target in the middle of another frame.

    Args:
        image: (3, H, W), what is to be pasted.
        target: its masks (N, H, W), labels, and weights if it has them.
        frame: height and width, h and w.

    Returns:
        (3, h, w) with 0 where the image does not reach, and the target in that frame.
    """
    # Positive: room on that side; negative: cut off.
    height, width = image.shape[-2:]
    top, left = (frame[0] - height) // 2, (frame[1] - width) // 2
    room = (left, frame[1] - width - left, top, frame[0] - height - top)
    # Image and maps are moved alike. Boxes are left as they were: `paste` derives new
    # ones from the visible parts of the masks.
    kept = {k: pad(maps, room) for k, maps in target.items() if k.startswith("mask")}
    return pad(image, room), {**target, **kept}


def scatter(
    image: Tensor,
    target: dict,
    frame: tuple[int, int],
    jitter: float,
    generator: torch.Generator,
) -> tuple[Tensor, dict]:
    """Each instance scaled by itself and put at a random place of another frame.

    Args:
        image, target, frame: as for `place`; best instance first, none empty.
        jitter: the scale is drawn from 1 - jitter to 1 + jitter.
        generator: of the scales and places.

    Returns:
        As `place`: (3, h, w), which is 0 where no instance lies, and the target there,
        whose masks are disjoint.
    """
    # Pixels and maps in the new frame, which fill up instance by instance.
    canvas = image.new_zeros(3, *frame)
    names = [name for name in target if name.startswith("mask")]
    moved = {name: target[name].new_zeros(0, *frame) for name in names}
    # From the worst to the best instance: what is put down later lies in front.
    for k in reversed(range(len(target["labels"]))):
        # Cut out by the box of its mask; what else is in the box is not pasted.
        left, top, right, bottom = boxes_of(target["masks"][k : k + 1])[0].int()
        part = {name: target[name][k, top:bottom, left:right][None] for name in names}
        part["image"] = image[:, top:bottom, left:right]
        # Scale and place; the same for the pixels and all maps of the instance.
        draws = torch.rand(3, generator=generator).tolist()
        scale = 1 + jitter * (2 * draws[0] - 1)
        size = [max(1, round(s * scale)) for s in part["image"].shape[-2:]]
        # Anywhere in the frame; what is larger than the frame is cut at its end.
        y, x = (
            int(draw * (max(0, room - side) + 1))
            for draw, room, side in zip(draws[1:], frame, size, strict=True)
        )
        room = (x, frame[1] - size[1] - x, y, frame[0] - size[0] - y)
        for name, maps in part.items():
            # Masks stay 0 or 1; image and weights are interpolated.
            mode = NEAREST_EXACT if name == "masks" else v2.InterpolationMode.BILINEAR
            # Beyond its box an instance certainly is not: the largest of all its
            # weights, which `paste` looks for, may have been cut off.
            beyond = target[name][k].max().item() if name == "mask_weights" else 0
            maps = F.resize(maps, size, mode, antialias=False)
            part[name] = pad(maps, room, value=beyond)
        canvas = torch.where(part["masks"].bool(), part["image"], canvas)
        moved = {name: torch.cat([part[name], moved[name]]) for name in names}
    # From front to back: a pixel belongs to the first instance that has it, where the
    # running count is 1.
    first = moved["masks"].cumsum(dim=0, dtype=torch.int16) == 1
    return canvas, {**target, **moved, "masks": hide(moved["masks"], first)}


def paste(
    image: Tensor, target: dict, above: Tensor, source: dict
) -> tuple[Tensor, dict]:
    """The instances of one image in front of another's.

    Args:
        image, target: the image below, and its instances.
        above, source: the image that is pasted, in the same frame (`place`).

    Returns:
        The new image and its target: boxes of the masks that can be seen, nothing
        degenerate.
    """
    # M of the equation: every pixel of some pasted instance.
    pasted = source["masks"].bool().any(dim=0)  # (H, W)
    # What was there loses what is pasted over, and nothing else.
    masks = torch.cat([source["masks"], hide(target["masks"], ~pasted)])  # (N, H, W)
    both = dict(masks=masks, labels=torch.cat([source["labels"], target["labels"]]))
    if "mask_weights" in target:
        weights = torch.cat([source["mask_weights"], target["mask_weights"]])
        # Two kinds of pixels are certain whatever the teacher thought: for a pasted
        # instance all that it does not cover (its old surroundings are not in this
        # image), and for the others all that was pasted over. They get the largest
        # weight of their instance.
        number = torch.arange(len(weights), device=weights.device)[:, None, None]
        sure = torch.where(number < len(source["labels"]), masks == 0, pasted)
        most = weights.amax(dim=(1, 2), keepdim=True)
        both["mask_weights"] = torch.where(sure, most, weights)
    # S4M Eq. (ARP). Instances without a visible pixel are dropped by `sanitize`.
    return torch.where(pasted, above, image), sanitize(both)
