r"""Targets and streams: what the model is trained on, and in which order.

*Targets* are torchvision's dicts: `boxes` (N, 4) float32, xyxy in absolute pixels with
`x2 > x1` and `y2 > y1`; `labels` (N,) int64, 1..C, since 0 is background; `masks`
(N, H, W) uint8. A box is the box of its mask; a pseudo-label has the predicted box,
until SAM or pasting changes its mask. Targets made of pseudo-labels may have
`mask_weights` (N, H, W) float in [0, 1] as well.

*The batches are a pure function of the seed and the step.* Item k of a stream decides
which image it is and the seed of its augmentation. So a resumed run needs nothing but
the number of the step, and neither the number of loader workers nor that of processes
changes which views are drawn. (What is pasted onto them is chosen within a process.)

*Rare classes.* If each labeled image comes once in an epoch, a class that few of them
have is seldom seen. With repeat-factor sampling (GD, S4M) an image comes in proportion
to the need of its rarest class; an epoch keeps its length.

*Only two of the three streams know any ground truth.* The labeled stream trains the
student, and the audit's measures the pseudo-labels. The unlabeled stream does not even
read the annotations of its images, so nothing can leak.

Chain: 2 of 23. Read next: `ssis/augment.py`, the views of an image.
"""

import hashlib
import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from ssis import UserError, augment


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


# Bytes of reduced images and masks that a stream keeps, at most.
KEPT = 5e8


class ViewSize(NamedTuple):
    """What a weak view may look like.

    Attributes:
        short_min, short_max, long_max: pixels; the short side is drawn from the first
            to the second, unless the long side would pass the third.
        crop: height and width, pixels. With a crop the three do not count: the image is
            resized to `scale` times what fits into the crop, and cut. (0, 0): no crop.
        scale: the smallest and the largest scale before a crop.
        color: whether colors are distorted.
        flip: whether one view in two is mirrored, left to right.
    """

    short_min: int
    short_max: int
    long_max: int
    crop: tuple[int, int] = (0, 0)
    scale: tuple[float, float] = (1.0, 1.0)
    color: bool = False
    flip: bool = True


class Stream(torch.utils.data.Dataset):
    """An endless shuffled sequence of views; item k is the same in every run.

    Item k is image `order_e[k mod n]` in epoch `e = k div n`, with an order and an
    augmentation that depend on (seed, k) alone. The order is a permutation, or, with
    factors, a draw in which frequent images take the place of others.

    Args:
        dataset: where the images are.
        indices: which of them take part; at least one.
        size: of the views.
        seed: of this stream; labeled and unlabeled streams have different ones.
        with_target: False hides the annotations, as semi-supervised learning demands.
        factors: how often each image is drawn, in proportion; None: all alike.
    """

    def __init__(
        self,
        dataset,
        indices: list[int],
        size: ViewSize,
        seed: int,
        with_target: bool,
        factors: list[float] | None = None,
    ):
        self.dataset, self.indices = dataset, np.array(indices, np.int64)
        self.factors = None if factors is None else np.array(factors)
        self.size, self.seed, self.with_target = size, seed, with_target
        self._epoch, self._order = -1, np.zeros(0, np.int64)
        self._kept: dict[int, tuple] = {}
        self._room = KEPT

    def read(self, index: int) -> tuple[Tensor, dict | None, tuple[int, int]]:
        """An image, its target and its size; what is much too large is reduced.

        A photograph of 12 megapixels takes 0.2 s to decode, so it is kept once it is
        small: 0.5 MB with views of 240 pixels, and a third of it for each mask.
        """
        if index in self._kept:
            return self._kept[index]
        image = self.dataset.image(index)
        target = self.dataset.target(index) if self.with_target else None
        original = tuple(image.shape[-2:])
        # A crop may be of any scale.
        small = (
            image if self.size.crop[0] else augment.reduced(image, self.size.long_max)
        )
        if small is not image:
            if target is not None:
                masks = augment.resize_masks(target["masks"], small)
                target = dict(target, masks=masks)
            size = small.nbytes + (0 if target is None else target["masks"].nbytes)
            if size <= self._room:
                self._room -= size
                self._kept[index] = small, target, original
        return small, target, original

    def __getitem__(self, k: int) -> dict:
        """Item k, a weak view.

        Returns:
            `image` (3, h, w) float in [0, 1]; `index` of the image in the dataset;
            `seed` of the view; `geometry`, an `augment.Geometry`; and `target`, if this
            stream has targets.
        """
        # Each epoch has a permutation of its own, drawn from (seed, epoch). The latest
        # one is remembered; asking for items in another order only costs time.
        epoch, position = divmod(k, len(self.indices))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
            order = torch.randperm(len(self.indices), generator=generator).numpy()
            if self.factors is not None:
                # Images laid end to end, each as long as its factor, and read off at
                # equal distances from a random start: an image with twice the factor
                # is read twice as often, and no epoch is far from the proportion.
                ends = np.cumsum(self.factors)
                start = torch.rand((), generator=generator).item()
                marks = (start + np.arange(len(ends))) * ends[-1] / len(ends)
                order = np.searchsorted(ends, marks, side="right")[order]
            self._epoch, self._order = epoch, order
        index = int(self.indices[self._order[position]])
        image, target, original = self.read(index)
        # Epochs and items are both numbered 0, 1, 2, ...; with k itself, item 1 would
        # have the seed of epoch 1's permutation. ~k is -1 - k, so items have -1, -2,
        # ... and no view shares a seed with a permutation.
        seed = _mix(self.seed, ~k)
        view = (target, self.size, seed, original)
        image, target, geometry = augment.weak_view(image, *view)
        item = dict(image=image, index=index, seed=seed, geometry=geometry)
        return item if target is None else dict(item, target=sanitize(target))


def _mix(seed: int, number: int) -> int:
    """One 63-bit seed from two numbers.

    A sum or a product would give equal seeds to different pairs, and neighboring seeds
    to neighboring items. A hash does neither, and is the same on every machine.
    """
    digest = hashlib.blake2b(f"{seed},{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def repeat_factors(dataset, indices: list[int], threshold: float) -> list[float]:
    """Repeat-factor sampling (LVIS): how often each image is to be drawn.

    With f_c the fraction of the images that have class c, the factor of a class is
    max(1, sqrt(threshold / f_c)), that of an image the largest of its classes. GD and
    S4M have a threshold of 10, which no f_c reaches, so only the square root of the
    frequency of an image's rarest class counts: on Cityscapes an image with a train is
    drawn some four times as often as one with cars alone.

    Args:
        dataset: with `present_labels`.
        indices: images among which the fractions are taken.
        threshold: above 0.

    Returns:
        A factor >= 1 for each image; 1 without any instance.
    """
    present = [dataset.present_labels(index) for index in indices]
    counts = Counter(label for labels in present for label in labels)
    of = {
        label: max(1.0, math.sqrt(threshold * len(indices) / count))
        for label, count in counts.items()
    }
    return [max((of[label] for label in labels), default=1.0) for labels in present]


class Streams(NamedTuple):
    """The streams of a run. Only `unlabeled` knows no ground truth.

    `repeated` is `labeled`, or the same images drawn by their repeat factors.
    """

    labeled: Stream
    unlabeled: Stream
    audit: Stream | None
    repeated: Stream


def make_streams(
    train_set,
    labeled: list[int],
    unlabeled: list[int],
    size: ViewSize,
    seed: int,
    oracle: str,
    repeat_threshold: float = 0.0,
    audited: bool = True,
) -> Streams:
    """The streams of a run.

    Args:
        train_set: `datasets.dataset.Dataset`.
        labeled, unlabeled: indices of its images.
        size: of the views.
        seed: of the run.
        oracle: "none", or what the ground truth replaces in the pseudo-labels.
        repeat_threshold: of `repeat_factors`, for the labeled images after pretraining;
            0: all alike.
        audited: False: images without annotations may have instances, so they are not
            audited.

    Returns:
        The streams. The audit's is over those unlabeled images whose ground truth
        is known; None without any.

    Raises:
        UserError: an oracle, and unlabeled images without ground truth.
    """
    hidden = set(unlabeled) - set(labeled)
    if oracle != "none" and max(unlabeled, default=0) >= train_set.annotated:
        raise UserError(
            f"--oracle {oracle}: needs the ground truth of every unlabeled image, and "
            "--unlabeled-images has none; leave one of the two out"
        )
    known = [i for i in sorted(hidden) if i < train_set.annotated and audited]
    plain = repeated = Stream(train_set, labeled, size, seed * 3, True)
    if repeat_threshold:
        factors = repeat_factors(train_set, labeled, repeat_threshold)
        repeated = Stream(train_set, labeled, size, seed * 3, True, factors)
    # Three seeds for each run: run 0 has 0, 1, 2; run 1 has 3, 4, 5. With seed + i the
    # unlabeled stream of run 0 would be shuffled as the labeled one of run 1 is, and
    # the runs of a study would not be independent.
    return Streams(
        plain,
        # The one exception: an oracle replaces pseudo-labels by the ground truth.
        Stream(train_set, unlabeled, size, seed * 3 + 1, oracle != "none"),
        Stream(train_set, known, size, seed * 3 + 2, True) if known else None,
        repeated,
    )


def to_device(items: list[dict], device) -> tuple[list[Tensor], list[dict]]:
    """Images and targets of a batch, copied to where the network is.

    Args:
        items: of `Stream`, with targets.
        device: there; the host does not wait until a GPU has done all that came before.
    """
    images = [item["image"].to(device, non_blocking=True) for item in items]
    targets = [
        {k: v.to(device, non_blocking=True) for k, v in item["target"].items()}
        for item in items
    ]
    return images, targets


class Shard(torch.utils.data.Sampler):
    """The numbers of the items of one process: its part of each global batch.

    The global batch of step s is items s * B to (s + 1) * B - 1 of the stream, whatever
    the number of processes n; process r takes the r-th of n equal parts of it. So two
    processes see together what one process would see alone.

    Args:
        batch: B, images in a global batch; a multiple of `world_size`.
        start, stop: steps; a resumed run starts where it was stopped.
        rank, world_size: r and n.
        ahead: added to the number of every item, where an earlier part of the run had
            larger batches (below 0: smaller ones).
    """

    def __init__(
        self,
        batch: int,
        start: int,
        stop: int,
        rank: int,
        world_size: int,
        ahead: int = 0,
    ):
        self.batch, self.start, self.stop, self.ahead = batch, start, stop, ahead
        self.rank, self.size = rank, batch // world_size

    def __iter__(self):
        for step in range(self.start, self.stop):
            begin = self.ahead + step * self.batch + self.rank * self.size
            yield list(range(begin, begin + self.size))

    def __len__(self) -> int:
        return max(0, self.stop - self.start)
