r"""Streams: what the model is trained on, and in which order.

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

Chain: 2 of 24. Read next: `ssis/targets.py`, what an item of a stream has to teach.
"""

import hashlib
import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssis import UserError, augment
from ssis.targets import sanitize

# Bytes of reduced images and masks that a stream keeps, at most.
KEPT = 5e8


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
        size: augment.ViewSize,
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
    size: augment.ViewSize,
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
