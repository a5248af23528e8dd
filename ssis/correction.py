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

*prototypes* (`ssis/prototypes.py`). A memory of labeled instances, as the teacher sees
them. By default; needs no other network.

*clip* (`ssis/clip.py`). The paper's: CLIP on mask-pooled features, against the
embeddings of described class names. For photographs of things that have names.

*imagenet* (`ssis/imagenet.py`). Class means of the features of the ImageNet backbone
that the run starts from, as it was downloaded. For photographs on a CPU.

Chain: 13 of 24. Read next: `ssis/prototypes.py`, the default category classifier.
"""

import dataclasses
import math

import torch
from torch import Tensor, nn

from ssis.teacher import PseudoLabels

# Labeled views that fill the memory at first, and steps between its updates. An update
# costs one forward pass of the teacher's backbone over a labeled batch.
START_VIEWS = 128
REFRESH_EVERY = 10


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

    `prototypes.Prototypes` and `imagenet.ClassMeans` have a memory and override all of
    it.
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
        classifier: `prototypes.Prototypes`, `clip.Clip` or `imagenet.ClassMeans`.
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
