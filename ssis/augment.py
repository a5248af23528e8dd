r"""Weak and strong views; S4M's copy-paste of refined pseudo-labels (ARP).

Consistency under augmentation drives teacher-student learning: the teacher sees an easy
*weak* view and must be right, the student sees a hard *strong* view of the same
image and must agree. What the two views may do follows from that:

* weak = resize and horizontal flip only. These are geometric. The student's view is
  made from the weak view, so the pseudo-labels are already in the student's frame.
* strong = photometric only: jitter of color, gray, blur. No pixel moves, so the
  pseudo-labels need no change.

GD (arXiv 2308.02668), section 4: ColorJitter(0.4, 0.4, 0.4, 0.1) with probability 0.8,
grayscale 0.2, Gaussian blur of sigma 0.1 to 2.0 with probability 0.5.

*ARP* (S4M, augmentation with refined pseudo-labels) comes between the two: the
instances of one image are pasted onto another, and the other way round. This makes
occlusions, new backgrounds and crowds, which are rare in a few labeled images. If the
masks are loose, the student learns to find pasted borders of background (in S4M's
ablation ARP then hurts); with masks redrawn by SAM it helps. On the built-in data it
helps either way (docs/results.md).

    pairs       max(1, B // 4) disjoint pairs of the batch's images, both directions
    what        every instance of at least `arp_min_area` of the image that it is pasted
                onto (S4M: 3000 pixels of a crop of 1024 x 1024)
    where       at its own coordinates, centers of the images on each other; at a random
                scale with `arp_jitter` (S4M on COCO: 0.8 to 1.2)
    how         a pixel is that of the pasted instances' union M, or what was there:

$$x = M \odot x_{\mathrm{above}} + (1 - M) \odot x_{\mathrm{below}}$$ S4M Eq. (ARP)

    occlusion   pasted instances lie in front; among them, the best pseudo-label does.
                No pixel belongs to two instances afterwards
    labels      masks lose what is hidden; boxes are those of the new masks; an instance
                of which less than a tenth is left is dropped

*Why the student's view must be hard.* If both saw the same view, the student would soon
copy the teacher and learn nothing more. The distortion removes color and fine texture,
on which a small network relies most, so that shape is left to agree on.

Every view has a seed of its own, so a run does not depend on how the images are spread
over workers and processes. Only ARP's pairs depend on it: they are made within one
process.

Chain: 3 of 16. Read next: `ssis/model.py`, the network that sees the views.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ssis import data

NEAREST_EXACT = v2.InterpolationMode.NEAREST_EXACT


# GD section 4, in the order of its text. The kernel spans about three sigmas.
STRONG = v2.Compose(
    [
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.GaussianBlur(kernel_size=13, sigma=(0.1, 2.0))], p=0.5),
    ]
)


class Geometry(NamedTuple):
    """How a weak view was made from its original: what SAM's prompts need to know.

    Attributes:
        original: height and width of the original image.
        view: height and width of the view.
        flip: whether it is mirrored, left to right.
    """

    original: tuple[int, int]
    view: tuple[int, int]
    flip: bool

    def to_original(self, points: Tensor) -> Tensor:
        """Points (.., 2) of the view, x and y, in the original frame.

        Continuous coordinates in both: the center of the first pixel is 0.5.
        """
        # Mirrored about the middle of the view: with continuous coordinates x becomes
        # width - x. With pixel numbers it would be width - 1 - x, the usual slip.
        height, width = self.view
        x, y = points.unbind(dim=-1)
        x = width - x if self.flip else x
        scale_x, scale_y = self.original[1] / width, self.original[0] / height
        return torch.stack([x * scale_x, y * scale_y], dim=-1)

    def to_view(self, maps: Tensor) -> Tensor:
        """Maps (.., h, w) of the original, already of the view's size, in the view."""
        return maps.flip(-1) if self.flip else maps


def weak_view(image: Tensor, target: dict | None, size: "data.ViewSize", seed: int):
    """Resize to a random short side and flip with probability one half.

    Args:
        image: (3, H, W) uint8, original frame.
        target: `labels` (N,) and `masks` (N, H, W) uint8, or None.
        size: the limits of its sides.
        seed: of this view.

    Returns:
        image (3, h, w) float32 in [0, 1], the target with its masks in that frame, and
        its `Geometry`. Masks may have become empty: `data.sanitize` comes next.
    """
    # One generator for each view, seeded by the stream: it does not matter which worker
    # makes the view, or what was made before it.
    original = tuple(image.shape[-2:])
    generator = torch.Generator().manual_seed(seed)
    short = torch.randint(
        size.short_min, size.short_max + 1, (), generator=generator
    ).item()
    flip = torch.rand((), generator=generator).item() < 0.5
    # First the pixels, as uint8 (a quarter of the memory), then masks to their size.
    image = resize(image, short, size.long_max)
    if target is not None:
        target = dict(target, masks=resize_masks(target["masks"], image))
    if flip:
        image = F.horizontal_flip(image)
        target = target and dict(target, masks=target["masks"].flip(-1))
    geometry = Geometry(original, tuple(image.shape[-2:]), flip)
    # From 0..255 to 0..1, which is what torchvision's models normalize.
    return F.to_dtype(image, torch.float32, scale=True), target, geometry


def resize(image: Tensor, short: int, longest: int) -> Tensor:
    """Short side to `short`, unless the long side would pass `longest`.

    Without antialiasing, as torchvision's own Mask R-CNN resizes: its published weights
    were trained on such pixels. A strip is not made narrower than 16 pixels.
    """
    height, width = image.shape[-2:]
    # One scale for both sides: whichever limit is reached first decides.
    scale = min(short / min(height, width), longest / max(height, width))
    size = [max(16, round(height * scale)), max(16, round(width * scale))]
    return image if size == [height, width] else F.resize(image, size, antialias=False)


def resize_masks(masks: Tensor, image: Tensor) -> Tensor:
    """Masks (N, H, W) to the size of a resized image.

    Nearest neighbor, so a mask stays 0 or 1; the exact one, since plain NEAREST rounds
    down and shifts the masks by half a pixel against the image.
    """
    return F.resize(masks, list(image.shape[-2:]), NEAREST_EXACT)


def strong_view(image: Tensor, seed: int) -> Tensor:
    """The photometric distortion of one image.

    Args:
        image: (3, H, W) float in [0, 1], a weak view, on any device.
        seed: of this view. torchvision draws from the global generator, whose state is
            therefore saved and restored.

    Returns:
        (3, H, W) float in [0, 1]; no pixel has moved.
    """
    # On the image's device: the loader's workers make weak views, since the teacher
    # needs those; the distortion follows in the training process.
    with torch.random.fork_rng(devices=[]):
        # The CPU's generator alone: `torch.manual_seed` would also reseed those of the
        # GPUs, which this context does not restore.
        torch.default_generator.manual_seed(seed)
        return STRONG(image)


def strong_views(images: list[Tensor], items: list[dict]) -> list[Tensor]:
    """The strong view of each image, by the seed of its item."""
    pairs = zip(images, items, strict=True)
    return [strong_view(image, item["seed"]) for image, item in pairs]


# An instance of which less than this fraction is still visible is dropped.
VISIBLE = 0.1


def arp(
    images: list[Tensor], targets: list[dict], min_area: float, jitter: float, seed: int
) -> tuple[list[Tensor], list[dict]]:
    """S4M's copy-paste among the images of a batch.

    Args:
        images: B of (3, H, W) float in [0, 1], of any sizes; not changed.
        targets: B dicts of boxes, labels, masks (N, H, W) uint8, and mask_weights
            (N, H, W) or not; best instance first. Not changed.
        min_area: smallest mask that is pasted, as a fraction of the image.
        jitter: what is pasted is scaled by 1 - jitter to 1 + jitter.
        seed: of pairs and scales.

    Returns:
        Images and targets of the same sizes; those outside of the pairs are the same
        objects.
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
            # A scale between 1 - jitter and 1 + jitter, one for all that is pasted.
            draw = 2 * torch.rand((), generator=generator) - 1
            scale = 1 + (jitter * draw).item()
            made_images[below], made_targets[below] = paste(
                images[below],
                targets[below],
                *place(images[above], targets[above], images[below], scale),
                min_area,
            )
    return made_images, made_targets


def place(
    image: Tensor, target: dict, like: Tensor, scale: float
) -> tuple[Tensor, dict]:
    """An image and its target, scaled, in the middle of a frame like another's.

    Args:
        image: (3, H, W), what is to be pasted.
        target: its masks (N, H, W), labels, and weights if it has them.
        like: (3, h, w), whose frame it is to have.
        scale: of image and masks.

    Returns:
        (3, h, w) with 0 where the image does not reach, and the target in that frame.
    """
    # Scaled first, if at all: masks stay 0 or 1, weights are interpolated.
    size = [max(1, round(side * scale)) for side in image.shape[-2:]]
    if size != list(image.shape[-2:]):
        image = F.resize(image, size, antialias=False)
        resized = dict(target, masks=F.resize(target["masks"], size, NEAREST_EXACT))
        if "mask_weights" in target:
            resized["mask_weights"] = F.resize(target["mask_weights"], size)
        target = resized
    # Positive: room on that side; negative: cut off.
    top = (like.shape[-2] - size[0]) // 2
    left = (like.shape[-1] - size[1]) // 2
    right, bottom = like.shape[-1] - size[1] - left, like.shape[-2] - size[0] - top
    room = (left, right, top, bottom)
    # Image and maps are moved alike. Boxes are left as they were: `paste` derives new
    # ones from the visible parts of the masks.
    kept = {k: pad(maps, room) for k, maps in target.items() if k.startswith("mask")}
    return pad(image, room), {**target, **kept}


def paste(
    image: Tensor, target: dict, above: Tensor, source: dict, min_area: float
) -> tuple[Tensor, dict]:
    """The instances of one image in front of another's.

    Args:
        image, target: the image below, and its instances.
        above, source: the image that is pasted, in the same frame (`place`).
        min_area: smallest mask that is pasted, as a fraction of the frame.

    Returns:
        The new image and its target: disjoint masks, their boxes, nothing degenerate.
    """
    # The area within this frame: pixels that are cut off by it do not count, pixels
    # that others hide do.
    masks = source["masks"].bool()
    # S4M: tiny instances are not pasted; most of them are wrong.
    big = masks.flatten(1).sum(dim=1) >= min_area * image.shape[-2] * image.shape[-1]
    source = {key: value[big] for key, value in source.items()}
    stack = torch.cat([source["masks"], target["masks"]]).bool()  # (N, H, W)
    # From front to back: pasted instances first, the best of them in front. A pixel
    # belongs to the first instance that has it, where the running count is 1.
    visible = stack & (stack.cumsum(dim=0, dtype=torch.int16) == 1)
    # M of the equation: every pixel that some pasted instance owns.
    pasted = visible[: len(source["labels"])].any(dim=0)
    both = dict(
        masks=visible.to(torch.uint8),
        labels=torch.cat([source["labels"], target["labels"]]),
    )
    if "mask_weights" in target:
        weights = torch.cat([source["mask_weights"], target["mask_weights"]])
        # Two kinds of pixels are certain whatever the teacher thought: for a pasted
        # instance all that it does not cover (its old surroundings are not in this
        # image), and for the others all that was pasted over. They get the largest
        # weight of their instance.
        number = torch.arange(len(weights), device=weights.device)[:, None, None]
        sure = torch.where(number < len(source["labels"]), ~visible, pasted)
        most = weights.amax(dim=(1, 2), keepdim=True) if len(weights) else 1.0
        both["mask_weights"] = torch.where(sure, most, weights)
    # A sliver of an instance is no good example of its class.
    area = stack.flatten(1).sum(dim=1)
    seen = visible.flatten(1).sum(dim=1) >= VISIBLE * area
    both = {key: value[seen] for key, value in both.items()}
    # S4M Eq. (ARP). Instances without a visible pixel are dropped by `sanitize`.
    return torch.where(pasted, above, image), data.sanitize(both)
