r"""PL-DC, category level: dynamic instance category correction.

A teacher trained on few images finds and outlines objects far better than it names
them, and it is confident of its wrong names, so no threshold on the class score removes
them. PL-DC therefore asks another classifier, the *category classifier*, about each
kept instance. It makes other mistakes. The two class distributions are mixed:

$$p = w(t) \, p_{\mathrm{category}} + (1 - w(t)) \, p_{\mathrm{teacher}}$$
PL-DC Eq. (DICC)

Both are distributions over the C classes, without background: the instance was kept, so
the question is only which class it is. The teacher's probabilities are divided by their
sum, which is the softmax of its logits without that of background, as in the released
code. Not divided, they would sum to less than 1, and the category classifier would
decide more often than w says.

The label becomes argmax p, the class quality max p. The weight of the category
classifier falls on a fixed schedule, because the teacher becomes better:

$$w(t) = \frac{1}{4} \left(\cos \pi \frac{t - t_{\mathrm{burn}}}
  {t_{\mathrm{max}} - t_{\mathrm{burn}}} + 1\right)$$ PL-DC Eq. (w)

It is one half until the end of the burn-in, and falls from there to 0 at the end of the
run. With `--filter calibrated`, as in `full`, it is measured instead
(`ssis/calibration.py`), and stays.

Why a mixture and not a vote? In a mixture the confidence of each side counts. And the
weight falls on purpose: an opinion that never changes would in the end hold back a
teacher that has become better.

Three category classifiers (`--correction`):

*prototypes.* A memory of the labeled instances: the teacher's features of up to 64
instances of each class. A pseudo-label is compared with all of them; a class is as
likely as its three nearest instances are near. Two things are compared: the feature map
in the box, set to 0 outside of the mask, and the silhouette, which is the soft mask in
a 16 x 16 grid. So this classifier sees what the teacher's own cannot: where the object
ends, and what is only next to it. (Class means, pooled features and other views were
measured too, and are no better than the teacher: docs/log.md.) During the run the
oldest instances are replaced by newer ones, as the EMA teacher sees the labeled images.
If the student started afresh (`--burnin-init fresh`), the first teacher's instances are
thrown away with it: the features of two networks cannot be compared.

*clip* (`ssis/clip.py`). The paper's: CLIP on mask-pooled features, against the
embeddings of described class names. For photographs of things that have names.

*imagenet* (`ssis/imagenet.py`). Class means of the features of the ImageNet backbone
that the run starts from, as it was downloaded. For photographs on a CPU.

Chain: 10 of 20. Read next: `ssis/clip.py`, the paper's own category classifier.
"""

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from ssis import data, distributed
from ssis import teacher as teacher_module
from ssis.teacher import PseudoLabels

# Labeled views that fill the memory at first, and steps between its updates. An update
# costs one forward pass of the teacher's backbone over a labeled batch.
START_VIEWS = 128
REFRESH_EVERY = 10
# Cells on a side of a silhouette, and nearest instances of each class.
SILHOUETTE = 16
NEAREST = 3
# Divides the cosines before the softmax. It is so small that a cosine that is higher by
# 0.02 takes nearly all: with w = 0.5 the category classifier mostly decides alone.
TEMPERATURE = 0.005


def weight(
    step: int, burnin_end: int, last: int, measured: float | None = None
) -> float:
    """How much the category classifier counts, from 0.5 down to 0.

    Args:
        step: t, steps done.
        burnin_end: t_burn, the step at which the guided burn-in ends.
        last: t_max, the last step.
        measured: another weight (`calibration.Calibration.trust`), or None. It is not
            faded out: it is measured again while the teacher becomes better.
    """
    if measured is not None:
        return measured
    # The teacher is frozen in the burn-in. It does not become better, so its weight
    # does not grow.
    if step <= burnin_end:
        return 0.5
    # PL-DC Eq. (w)
    angle = math.pi * (step - burnin_end) / (last - burnin_end)
    return 0.25 * (math.cos(angle) + 1)


class CategoryClassifier:
    """The interface of the category classifiers.

    `Prototypes` and `imagenet.ClassMeans` have a memory and override all of it.
    `clip.Clip` never learns and overrides the call alone: it has nothing to forget, to
    learn or to save.
    """

    def forget(self) -> None:
        """Empty the memory. Without a memory this does nothing."""

    def learn(self, teacher: nn.Module, items: list[dict]) -> None:
        """Remember labeled instances as the teacher sees them.

        Every process must call this. Without a memory it does nothing.

        Args:
            teacher: the network, in evaluation mode.
            items: labeled views of this process: `image` and `target`.
        """

    def state_dict(self) -> dict:
        """What a checkpoint must keep; {} without a memory."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take up what `state_dict` gave."""

    def __call__(self, image: Tensor, pseudo: PseudoLabels) -> Tensor:
        """Class distributions of the instances of one image.

        Args:
            image: a weak view, (3, H, W) float in [0, 1].
            pseudo: its N instances.

        Returns:
            (N, C) in [0, 1]; rows sum to 1. An all-zero row means no opinion.
        """
        raise NotImplementedError


def fuse(pseudo: PseudoLabels, opinion: Tensor, w: float) -> PseudoLabels:
    """Mix in the category classifier's opinion; masks, boxes and the order stay.

    Args:
        pseudo: of one image; none of its tensors is changed.
        opinion: (N, C) class distributions of the category classifier; an all-zero row
            means no opinion.
        w: weight of the opinion, in [0, 1]. Where it is 0, or there is no opinion, the
            instance stays as it is.
    """
    # Nothing to mix: not even rounding may change the teacher's own numbers.
    if w == 0:
        return pseudo
    # An all-zero row means no opinion; keep the teacher's distribution.
    asked = opinion.sum(dim=1) > 0  # (N,)
    # Over the foreground alone, as the opinion is.
    foreground = pseudo.distribution.sum(dim=1, keepdim=True).clamp(min=1e-30)
    # PL-DC Eq. (DICC)
    mixed = w * opinion + (1 - w) * pseudo.distribution / foreground  # (N, C)
    # The argmax may be another class now. Box and mask stay those of the old class; the
    # mask head was not asked for others. Column k is class k + 1, since background has
    # no column.
    quality, index = mixed.max(dim=1)
    return dataclasses.replace(
        pseudo,
        labels=torch.where(asked, index + 1, pseudo.labels),
        class_quality=torch.where(asked, quality, pseudo.class_quality),
        distribution=torch.where(asked[:, None], mixed, pseudo.distribution),
    )


def among_seen(logits: Tensor, seen: Tensor, distribution: Tensor) -> Tensor:
    """A softmax over the classes that a memory knows.

    Args:
        logits: (N, C).
        seen: (C,) how many instances of each class were remembered.
        distribution: (N, C), the teacher's.

    Returns:
        (N, C); rows sum to 1, or are all zero as long as no class was seen.
    """
    # A class that was never seen keeps the teacher's probability, over the foreground
    # alone as in `fuse`: there is nothing to compare with. The other classes divide the
    # rest among them.
    unseen = seen == 0
    kept = distribution * unseen
    kept = kept / distribution.sum(dim=1, keepdim=True).clamp(min=1e-30)
    others = logits.masked_fill(unseen, -torch.inf).softmax(dim=1)
    mixed = kept + (1 - kept.sum(dim=1, keepdim=True)) * others
    # No opinion with an empty memory.
    return torch.where(unseen.all(), 0.0, mixed)


def correct(
    pseudo: list[PseudoLabels],
    images: list[Tensor],
    classifier: CategoryClassifier,
    w: float,
) -> list[PseudoLabels]:
    """The pseudo-labels of B weak views, corrected by the category classifier.

    Args:
        pseudo: of each image.
        images: the weak views, (3, H, W) float in [0, 1] each.
        classifier: `Prototypes`, `clip.Clip` or `imagenet.ClassMeans`.
        w: weight of its opinion, of `weight`.
    """
    # Image by image: an opinion depends on nothing but the image and its instances.
    pairs = zip(pseudo, images, strict=True)
    return [fuse(labels, classifier(image, labels), w) for labels, image in pairs]


def fill(
    classifier: CategoryClassifier | None,
    teacher: nn.Module,
    labeled,
    rank: int,
    world_size: int,
) -> None:
    """Empty the classifier's memory and fill it; every process must call this.

    Args:
        classifier: or None, and then there is nothing to do.
        teacher: the network whose features are remembered.
        labeled: the labeled `data.Stream`; each process takes its part of it.
        rank, world_size: of this process.
    """
    # A classifier that never learns need not wait for 128 views to be made.
    if classifier is None or type(classifier).learn is CategoryClassifier.learn:
        return
    # The features of another network cannot be compared with this one's.
    classifier.forget()
    # Eight views at a time, as in a training batch. Each of several processes takes
    # eight of its own; `learn` exchanges them.
    chunk = 8
    for first in range(0, START_VIEWS, chunk * world_size):
        mine = range(first + rank * chunk, first + (rank + 1) * chunk)
        classifier.learn(teacher, [labeled[k] for k in mine])


class Prototypes(nn.Module, CategoryClassifier):
    """Labeled instances as the teacher sees them; a module for its state dict.

    Args:
        classes: C.
        channels: D, of the feature pyramid.
        size: K, instances kept of each class.
    """

    def __init__(self, classes: int, channels: int, size: int):
        super().__init__()
        # A ring of K slots for each class: the newest instance replaces the oldest.
        # Buffers are saved in the checkpoint, so a resumed run remembers the same.
        length = channels * teacher_module.CELLS**2 + SILHOUETTE**2
        self.register_buffer("bank", torch.zeros(classes, size, length))
        # How many instances of each class were ever put in; number k is in slot k mod
        # K.
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.int64))

    @staticmethod
    def describe(features: Tensor, masks: Tensor, boxes: Tensor) -> Tensor:
        """The vectors that are compared, for some instances of one image.

        Args:
            features: (N, D, 7, 7), the feature maps in their boxes.
            masks: (N, H, W), soft or hard, in [0, 1]; none of them empty.
            boxes: (N, 4) of the features.

        Returns:
            (N, 49 D + 256), each row of length 1.
        """
        # One mask for each instance, and one box in each mask: box n belongs to mask n,
        # which `roi_align` wants to be told in its first column.
        masks = masks.float()
        number = torch.arange(len(boxes), device=boxes.device)[:, None]
        # The mask at the resolution of the feature map. Times it, cells in the box that
        # are not on the object become 0.
        rois = torch.cat([number.to(boxes), boxes], dim=1)
        inside = roi_align(masks[:, None], rois, teacher_module.CELLS, aligned=True)
        # All 49 cells, not their average: where in the box a part lies (the points of
        # a star, the hole of a ring) says what the object is.
        appearance = F.normalize((features * inside).flatten(1))
        # The silhouette, in the mask's own box: a loose predicted box would move it.
        tight = data.boxes_of(masks > 0.5) if len(masks) else boxes
        rois = torch.cat([number.to(boxes), tight], dim=1)
        cells = roi_align(masks[:, None], rois, SILHOUETTE, 1.0, 2, aligned=True)
        # Minus one half: inside positive, outside negative. Then the outside says as
        # much about a shape as the inside.
        shape = F.normalize((cells - 0.5).flatten(1))
        # Each part has length 1, both together the square root of 2. Divided by it, the
        # cosine of two instances is the mean of the cosines of their two parts.
        return torch.cat([appearance, shape], dim=1) / math.sqrt(2)

    def forget(self) -> None:
        """Empty the memory."""
        # With `seen` at 0 no slot counts; what is in it will be overwritten.
        self.seen.zero_()

    @torch.no_grad()
    def learn(self, teacher: nn.Module, items: list[dict]) -> None:
        """Put labeled instances into the memory; see `CategoryClassifier.learn`."""
        # In the ground-truth box, under the ground-truth mask: no mistake of the
        # teacher gets into the memory.
        device = self.bank.device
        views, targets = data.to_device(items, device)
        pooled = teacher_module.features_in(
            teacher, views, [t["boxes"] for t in targets]
        )
        described = [
            self.describe(features.float(), target["masks"], target["boxes"])
            for features, target in zip(pooled, targets, strict=True)
        ]
        # From here on it does not matter which image an instance comes from.
        labels = torch.cat([target["labels"] for target in targets])
        # Every process stores the instances of all, so all have the same memory. They
        # are exchanged on the CPU: gathered GPU tensors would stay on the sender's GPU.
        mine = (torch.cat(described).cpu(), labels.cpu())
        for rows, classes in distributed.gather(mine):
            # Slot by slot on the CPU, then all rows at once; of two rows for one slot
            # the later one stays.
            seen, rows_of = self.seen.tolist(), {}
            for n, k in enumerate((classes - 1).tolist()):
                rows_of[k, seen[k] % self.bank.shape[1]] = n
                seen[k] += 1
            if rows_of:
                which, slots = map(list, zip(*rows_of, strict=True))
                self.bank[which, slots] = rows[list(rows_of.values())].to(device)
                self.seen.copy_(torch.tensor(seen))

    @torch.no_grad()
    def forward(self, image: Tensor, pseudo: PseudoLabels) -> Tensor:
        """Class distributions (N, C); see `CategoryClassifier.__call__`."""
        if not len(pseudo):
            return torch.zeros_like(pseudo.distribution)
        # The features belong to the box that the teacher predicted; the mask may be
        # SAM's.
        query = self.describe(pseudo.features, pseudo.mask_probs, pseudo.feature_boxes)
        # Cosine with every instance in the memory; all vectors have length 1.
        similar = torch.einsum("nf,ckf->nck", query, self.bank)
        # An empty slot has cosine 0, which is more than that of an unlike instance. At
        # -1 it is nobody's neighbor.
        slots = torch.arange(self.bank.shape[1], device=query.device)
        similar[:, slots >= self.seen[:, None]] = -1
        # The mean of the nearest three of each class: a single one may be an odd case,
        # and the mean of all resembles no instance. A class with fewer instances is
        # judged by those that it has.
        count = min(NEAREST, similar.shape[2])
        nearest = similar.topk(count, dim=2).values  # (N, C, 3)
        present = torch.arange(nearest.shape[2], device=query.device)
        present = (present < self.seen[:, None].clamp(min=1)).to(nearest)
        mean = (nearest * present).sum(dim=2) / present.sum(dim=1)  # (N, C)
        return among_seen(mean / TEMPERATURE, self.seen, pseudo.distribution)
