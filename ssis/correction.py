r"""PL-DC, category level: dynamic instance category correction.

A teacher trained on few images finds and outlines objects far better than it names
them, and it is sure of its wrong names: no threshold on the class score takes them out.
So a second one, the *category classifier*, which makes other mistakes, is asked about
each kept instance, and the two class distributions are mixed:

$$p = w(t) \, p_{\mathrm{category}} + (1 - w(t)) \, p_{\mathrm{teacher}}$$
PL-DC Eq. (DICC)

The label becomes argmax p, the class quality max p. The category classifier counts less
and less, for the teacher learns more than it does:

$$w(t) = \frac{1}{4} \left(\cos \pi \frac{t - t_{\mathrm{burn}}}
  {t_{\mathrm{max}} - t_{\mathrm{burn}}} + 1\right)$$ PL-DC Eq. (w)

so it is one half until the end of the burn-in, and falls to 0 at the end.

Why a mixture and not a vote? How sure each side is counts, times its weight. And the
weight fades on purpose: an opinion that never changes would in the end hold back a
teacher that has become better than it.

Two category classifiers (`--correction`):

*prototypes.* The labeled instances themselves, as a memory: the teacher's features of
up to 64 instances of each class. An instance is compared with all of them; the class
whose three nearest are nearest on average wins. What is compared is the feature map in
the box, with everything outside of the mask set to 0, and beside it the silhouette, the
soft mask itself in a 16 x 16 grid. So it sees what the teacher's own classifier
cannot see: where the object ends and what is only next to it. Why not the class means,
pooled features, other views: they were measured and are no better than the teacher
(docs/log.md). As training goes on the oldest instances are replaced by
newer looks of the EMA teacher at the labeled images; where the student started afresh
(`--burnin-init fresh`) the first teacher's are thrown away with it, since the features
of two networks have nothing to do with each other.

*clip* (`ssis/clip.py`). What the paper has: CLIP on mask-pooled features, against the
embeddings of described class names. For photographs of things that have names.

Chain: 9 of 16. Read next: `ssis/clip.py`, the paper's own category classifier.
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

# Labeled views that fill the memory at first, and steps between its refreshes: each
# is a forward pass of the teacher's backbone over a labeled batch.
START_VIEWS = 128
REFRESH_EVERY = 10
# Cells of a silhouette, nearest instances asked, sharpness of the softmax.
SILHOUETTE = 16
NEAREST = 3
# So sharp that a cosine that is higher by 0.02 is nearly all: with w = 0.5 the category
# classifier mostly decides alone.
TEMPERATURE = 0.005


def weight(step: int, burn: int, last: int) -> float:
    """How much the category classifier counts, from 0.5 down to 0.

    Args:
        step: t, steps done.
        burn: t_burn, the step at which the guided burn-in ends.
        last: t_max, the last step.
    """
    # While the teacher is frozen it learns nothing, so its weight does not grow.
    if step <= burn:
        return 0.5
    # PL-DC Eq. (w)
    return 0.25 * (math.cos(math.pi * (step - burn) / (last - burn)) + 1)


class CategoryClassifier:
    """What both category classifiers offer.

    A classifier with a memory (`Prototypes`) overrides all of it; one that never learns
    (`clip.Clip`) overrides the call alone: it has nothing to forget, to learn or to
    save.
    """

    def forget(self) -> None:
        """Empty the memory, if there is one."""

    def learn(self, teacher: nn.Module, items: list[dict]) -> None:
        """Remember labeled instances as the teacher sees them, if there is a memory.

        Every process must call this.

        Args:
            teacher: the network, in evaluation mode.
            items: labeled views of this process: `image` and `target`.
        """

    def state_dict(self) -> dict:
        """What a checkpoint must keep: nothing without a memory."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """The counterpart of `state_dict`."""

    def __call__(self, image: Tensor, pseudo: PseudoLabels) -> Tensor:
        """Class distributions (N, C) of the instances of one image.

        A row of zeros means that there is no opinion.

        Args:
            image: a weak view, (3, H, W) float in [0, 1].
            pseudo: its N instances.
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
    # PL-DC Eq. (DICC)
    mixed = w * opinion + (1 - w) * pseudo.distribution  # (N, C)
    # The argmax may be another class now; boxes and masks are those of the old one, for
    # there are no others. Column k is class k + 1: column 0, background, is not in it.
    quality, index = mixed.max(dim=1)
    return dataclasses.replace(
        pseudo,
        labels=torch.where(asked, index + 1, pseudo.labels),
        class_quality=torch.where(asked, quality, pseudo.class_quality),
        distribution=torch.where(asked[:, None], mixed, pseudo.distribution),
    )


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
        classifier: `Prototypes` or `clip.Clip`.
        w: weight of its opinion, of `weight`.
    """
    # Image by image: an opinion depends on nothing but the image and its instances.
    pairs = zip(pseudo, images, strict=True)
    return [fuse(labels, classifier(image, labels), w) for labels, image in pairs]


def make_classifier(
    kind: str,
    names: list[str],
    channels: int,
    size: int,
    clip_model: str,
    descriptions: str,
    device,
) -> CategoryClassifier | None:
    """The category classifier of a kind, or None.

    Args:
        kind: "none", "prototypes" or "clip".
        names: class names.
        channels: D, of the feature pyramid.
        size: prototypes remembered of each class.
        clip_model, descriptions: of `clip.Clip`.
        device: where it is to be.

    Raises:
        ValueError: another kind.
    """
    if kind == "none":
        return None
    if kind == "prototypes":
        return Prototypes(len(names), channels, size).to(device)
    if kind == "clip":
        # Imported here: without CLIP nobody needs to have open_clip installed.
        from ssis.clip import Clip

        return Clip(clip_model, names, descriptions, device)
    raise ValueError(f"no category classifier {kind!r}: none, prototypes or clip")


def fill(
    classifier: CategoryClassifier | None,
    teacher: nn.Module,
    labeled,
    rank: int,
    world_size: int,
) -> None:
    """Fill the classifier's memory anew; every process must call this.

    Args:
        classifier: or None, and then there is nothing to do.
        teacher: the network whose features are remembered.
        labeled: the labeled `data.Stream`; each process takes its part of it.
        rank, world_size: of this process.
    """
    if classifier is None or type(classifier).learn is CategoryClassifier.learn:
        return
    # What another network saw means something else.
    classifier.forget()
    # Eight views at a time, as in a training batch; with several processes, each looks
    # at eight of its own and `learn` puts them together.
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
        # A ring of K places for each class: the newest instance replaces the oldest. As
        # buffers they are in the checkpoint, and a resumed run remembers the same.
        length = channels * teacher_module.CELLS**2 + SILHOUETTE**2
        self.register_buffer("bank", torch.zeros(classes, size, length))
        # How many instances of each class were ever put in; the k-th lies at k mod K.
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.int64))

    @staticmethod
    def describe(features: Tensor, masks: Tensor, boxes: Tensor) -> Tensor:
        """What is compared of some instances of one image.

        Args:
            features: (N, D, 7, 7), the feature maps in their boxes.
            masks: (N, H, W), soft or hard, in [0, 1]; none of them empty.
            boxes: (N, 4) of the features.

        Returns:
            (N, 49 D + 256), each row of length 1.
        """
        # One map for each instance, and so one box in each map: number n of the boxes
        # belongs to map n.
        masks = masks.float()
        number = torch.arange(len(boxes), device=boxes.device)[:, None]
        # What lies in the box but not on the object is not asked.
        rois = torch.cat([number.to(boxes), boxes], dim=1)
        inside = roi_align(masks[:, None], rois, teacher_module.CELLS, aligned=True)
        # All 49 places apart, not their average: where in the box a part lies (the
        # points of a star, the hole of a ring) says what it is.
        appearance = F.normalize((features * inside).flatten(1))
        # The shape alone, in its own box: where a loose box puts it does not matter.
        tight = data.boxes_of(masks > 0.5) if len(masks) else boxes
        rois = torch.cat([number.to(boxes), tight], dim=1)
        cells = roi_align(masks[:, None], rois, SILHOUETTE, 1.0, 2, aligned=True)
        # Less one half: the outside says as much about a shape as the inside.
        shape = F.normalize((cells - 0.5).flatten(1))
        # Each half has length 1, so together the square root of 2: the cosine of two
        # instances is the mean of what their looks and their shapes say.
        return torch.cat([appearance, shape], dim=1) / math.sqrt(2)

    def forget(self) -> None:
        """Empty the memory; what lies in it will be overwritten."""
        self.seen.zero_()

    @torch.no_grad()
    def learn(self, teacher: nn.Module, items: list[dict]) -> None:
        """Put labeled instances into the memory; see `CategoryClassifier.learn`."""
        # Under the true box and the true mask: no mistake of the teacher gets in.
        device = self.bank.device
        views = [item["image"].to(device) for item in items]
        targets = [{k: v.to(device) for k, v in i["target"].items()} for i in items]
        pooled = teacher_module.features_in(
            teacher, views, [t["boxes"] for t in targets]
        )
        described = [
            self.describe(features.float(), target["masks"], target["boxes"])
            for features, target in zip(pooled, targets, strict=True)
        ]
        # From here on it does not matter any more which image an instance is of.
        labels = torch.cat([target["labels"] for target in targets])
        # Every process puts in everybody's, so that all have the same memory.
        # Through the CPU: objects gathered from GPUs would stay on the sender's.
        mine = (torch.cat(described).cpu(), labels.cpu())
        for rows, classes in distributed.gather(mine):
            for row, label in zip(rows, classes.tolist(), strict=True):
                place = self.seen[label - 1] % self.bank.shape[1]
                self.bank[label - 1, place] = row.to(device)
                self.seen[label - 1] += 1

    @torch.no_grad()
    def forward(self, image: Tensor, pseudo: PseudoLabels) -> Tensor:
        """Class distributions of the instances of one image: (N, C), rows sum to 1."""
        if not len(pseudo) or not self.seen.any():
            return torch.zeros_like(pseudo.distribution)
        # The features are of the box that the teacher saw, the mask may be SAM's by
        # now.
        query = self.describe(pseudo.features, pseudo.mask_probs, pseudo.feature_boxes)
        # Cosine similarity with all that is in the memory, -1 where a place is empty.
        similar = torch.einsum("nf,ckf->nck", query, self.bank)
        # A place that was never filled must not be anybody's neighbor.
        places = torch.arange(self.bank.shape[1], device=query.device)
        similar[:, places >= self.seen[:, None]] = -1
        # The mean of the nearest few of each class: one alone may be a mistake, and the
        # mean of all is no longer the shape of any. A class with fewer instances is
        # judged by those that it has.
        nearest = similar.topk(
            min(NEAREST, similar.shape[2]), dim=2
        ).values  # (N, C, 3)
        present = torch.arange(nearest.shape[2], device=query.device)
        present = (present < self.seen[:, None].clamp(min=1)).to(nearest)
        mean = (nearest * present).sum(dim=2) / present.sum(dim=1)  # (N, C)
        # Of a class that was never seen there is no opinion: it keeps the probability
        # that the teacher gives it, and the others share the rest.
        unseen = self.seen == 0
        kept = pseudo.distribution * unseen
        shares = (mean / TEMPERATURE).masked_fill(unseen, -torch.inf).softmax(dim=1)
        return kept + (1 - kept.sum(dim=1, keepdim=True)) * shares
