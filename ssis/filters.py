r"""PL-DC, instance level: decoupled dual-threshold filtering.

A wrong pseudo-label teaches the student a mistake, which the EMA then hands back to the
teacher. A missing one teaches that an object is background. The filter decides between
the two risks.

Each predicted instance has two qualities. They fail independently: a clean mask may
have the wrong class, and the right class may have a ragged mask.

$$c = \max_k P(k), \qquad
  m = \mathrm{mean}\{p_{xy} : p_{xy} > 0.5\}$$ PL-DC Eq. (quality)

with P the class distribution and p the mask probability. (As in torchvision, a proposal
can be a candidate for two classes; then c is P of the candidate's own class, which is
the largest one whenever it is above one half.) Six rules (`--filter`) say
what is kept:

* `score`, Guided Distillation's: the mask quality plays no part.

$$c > \tau_{\mathrm{class}}$$ GD Eq. (filter)

* `coupled`, the usual practice: one number, in which a high class quality makes up for
  a low mask quality, and the other way round.

$$c \cdot m \ge \tau_{\mathrm{class}}$$ PL-DC Eq. (coupled)

* `dual`, PL-DC as on arXiv: each quality has to pass a threshold of its own.

$$c \ge \tau_{\mathrm{class}} \;\wedge\; m \ge \tau_{\mathrm{mask}}$$ PL-DC Eq. (dual)

* `adaptive`, PL-DC at AAAI: thresholds for each class k that follow the teacher, so
  that a class on which the teacher is never confident is not lost altogether.

$$c \ge T^{\mathrm{class}}_k \;\wedge\; m \ge T^{\mathrm{mask}}_k$$ PL-DC Eq. (adaptive)

The adaptive thresholds start between T_min and T_max, lower the rarer the class is
among the labeled instances, and then follow the mean quality q of the class. Class and
mask quality each have a range [T_min, T_max] of their own:

$$T_k^0 = T_{\mathrm{min}} + (T_{\mathrm{max}} - T_{\mathrm{min}}) \, \frac{n_k}{N}$$
PL-DC Eq. (init)

$$T_k \leftarrow a T_k + (1 - a) \, \bar q_k$$ PL-DC Eq. (adapt)

* `three-way`: the summary of the AAAI paper says that instances of which both qualities
  are high are kept, that those far below are dropped, and that category correction
  decides on those in between. How, it does not say, and the released code does not have
  it. This project's reading: *ambiguous* is what reaches T_min in both qualities, but
  not T_k in both. It is kept if its class quality reaches T_k after the correction:

$$T^{\mathrm{class}}_{\mathrm{min}} \le c, \;
  T^{\mathrm{mask}}_{\mathrm{min}} \le m, \;
  \max_k p_k \ge T^{\mathrm{class}}_k$$ ssis Eq. (ambiguous)

  with p of PL-DC Eq. (DICC), or with `--align` of ssis Eq. (alignment), and k its
  argmax.

* `calibrated`, this project's: PL-DC decouples the class from the mask; this rule also
  decouples *that* something is there from *what* it is. A teacher of few images finds
  an animal, and divides its probability between bear and deer: c is low for both,
  though it is sure of an animal. So it is asked for the foreground alone, the
  probability of not being background, and the class is left to the category
  classifier:

$$o = \sum_k P(k), \qquad
  o \ge T^{\mathrm{found}}_k \;\wedge\; m \ge T^{\mathrm{mask}}_k$$ ssis Eq. (found)

  Candidates are predictions with a class quality above 0.3, before o is asked for. The
  thresholds are measured on the validation images (`ssis/calibration.py`). Of
  candidates that overlap, whatever their classes, that with the highest o stays.

With a single class n / N is 1, so the thresholds start at T_max: a teacher that is less
confident keeps nothing at first (the run warns). Lower `--tau-max`, or take
`--filter dual`. The rule `three-way` then keeps all that is ambiguous, since after
the correction there is no other class to be in doubt.

Differences from the released code: it averages all of the 100 best predictions, most of
them background, so the thresholds sink; each process has its own; a resumed run starts
them anew. Here the mean is over the candidates (class score >= T_min) of all
processes, T stays within [T_min, T_max], and the thresholds are in the checkpoint.

All rules also ask for a mask of more than `min_area` pixels.

What a missing pseudo-label teaches: to Mask R-CNN, an anchor or proposal that matches
no instance *is* background, so a dropped object is trained as background, at the weight
`no_object_unlabeled` (`ssis/losses.py`). An image without any pseudo-label is left out
of the step (PL-DC does so if no image on its GPU has one), or the whole image is
trained as background, as in Guided Distillation and S4M (`empty_images`).

Chain: 10 of 24. Read next: `ssis/sam.py`, which redraws the masks of what is kept.
"""

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from ssis import distributed
from ssis.teacher import PseudoLabels


# The rules whose thresholds follow the teacher.
ADAPTIVE = ("adaptive", "three-way")
# Class quality from which predictions are looked at where thresholds are measured.
LOWEST = 0.3
# Boxes that overlap by more are candidates for the same object: torchvision's limit.
NMS_IOU = 0.5


class Thresholds(nn.Module):
    """PL-DC's adaptive class-aware thresholds; a module for its state dict.

    Args:
        classes: C.
        class_range, mask_range: T_min and T_max of each quality, in [0, 1].
        decay: a, in [0, 1]; how slowly the thresholds follow.
    """

    def __init__(
        self,
        classes: int,
        class_range: tuple[float, float],
        mask_range: tuple[float, float],
        decay: float,
    ):
        super().__init__()
        self.decay = decay
        # Row 0 for the class quality, row 1 for the mask quality. The ranges are
        # settings, so they are not saved; as buffers they move to the GPU with the
        # rest.
        lowest, highest = torch.tensor([class_range, mask_range]).T
        self.register_buffer("lowest", lowest[:, None], persistent=False)  # (2, 1)
        self.register_buffer("highest", highest[:, None], persistent=False)
        self.register_buffer("values", self.lowest.repeat(1, classes))  # (2, C)

    def start(self, frequency: Tensor) -> None:
        """Set all to their first values.

        Args:
            frequency: (C,) in [0, 1], the fraction n_k / N of each class among the
                labeled instances.
        """
        # PL-DC Eq. (init), each row in its own range.
        frequency = frequency.to(self.values)
        first = self.lowest + (self.highest - self.lowest) * frequency
        self.values.copy_(first)

    @torch.no_grad()
    def update(self, predictions: list[PseudoLabels]) -> None:
        """Follow the teacher; every process must call this in every step.

        Args:
            predictions: of the batch on this process, before the filter.
        """
        classes = self.values.shape[1]
        sums = self.values.new_zeros(3, classes)
        for image in predictions:
            # Candidates: what could pass at T_min. Without this limit the many
            # detections of low confidence would pull every threshold down.
            candidates = image[image.class_quality >= self.lowest[0]]
            qualities = torch.stack([candidates.class_quality, candidates.mask_quality])
            ones = torch.ones_like(qualities[:1])
            # Sums of c, of m and of 1 for each class: column n is added to the class of
            # candidate n. `sums[:, labels - 1] += ...` would count a class that appears
            # twice only once; `index_add_` adds every column.
            columns = torch.cat([qualities, ones]).float()  # (3, N)
            sums.index_add_(1, candidates.labels - 1, columns)
        # The mean over all processes: sums and counts are added up, never means.
        sums = distributed.all_sum(sums)
        # A class without a candidate in this step keeps its thresholds.
        seen = sums[2] > 0
        means = sums[:2] / sums[2].clamp(min=1)
        # PL-DC Eq. (adapt)
        followed = self.decay * self.values + (1 - self.decay) * means
        followed = torch.where(seen, followed, self.values)
        self.values.copy_(followed.clamp(self.lowest, self.highest))


def keep(
    predictions: PseudoLabels,
    rule: str,
    tau_class: float,
    tau_mask: float,
    min_area: int,
    thresholds: Thresholds | None = None,
) -> PseudoLabels:
    """The predictions of one image that the student is trained on.

    Args:
        predictions: of the teacher.
        rule: "score", "coupled", "dual", "adaptive", "three-way" or "calibrated".
        tau_class: threshold of the class quality, or of the product, in [0, 1].
        tau_mask: threshold of the mask quality, for "dual", in [0, 1].
        min_area: pixels; a mask needs more.
        thresholds: for the last three rules.

    Returns:
        What is kept; of "three-way" with what is ambiguous, for `decide`.

    Raises:
        ValueError: an unknown rule.
    """
    c, m = predictions.class_quality, predictions.mask_quality  # (N,), (N,)
    if rule == "score":
        # GD Eq. (filter)
        good = c > tau_class
    elif rule == "coupled":
        # PL-DC Eq. (coupled): what the paper replaces.
        good = c * m >= tau_class
    elif rule == "dual":
        # PL-DC Eq. (dual)
        good = (c >= tau_class) & (m >= tau_mask)
    elif rule in ("adaptive", "calibrated"):
        if rule == "calibrated":
            # ssis Eq. (found): one candidate for each object, and whether it is one.
            predictions = objects(predictions[area(predictions) > min_area])
            c, m = foreground(predictions), predictions.mask_quality
        # PL-DC Eq. (adaptive): each instance against the thresholds of its own class.
        own_class, own_mask = thresholds.values[:, predictions.labels - 1]
        good = (c >= own_class) & (m >= own_mask)
    elif rule == "three-way":
        # ssis Eq. (ambiguous), its first half; what is certain is above T_min as well.
        good = (c >= thresholds.lowest[0]) & (m >= thresholds.lowest[1])
    else:
        raise ValueError(
            f"no rule {rule!r}: score, coupled, dual, adaptive, three-way or calibrated"
        )
    # A few pixels are noise, whatever the scores say.
    return predictions[good & (area(predictions) > min_area)]


def decide(
    corrected: PseudoLabels, kept: PseudoLabels, thresholds: Thresholds
) -> PseudoLabels:
    """The last step of the rule "three-way": what is certain, and what was confirmed.

    Args:
        corrected: the instances of one image after refinement and correction.
        kept: the same instances, in the same order, as `keep` gave them.
        thresholds: T_k.
    """
    # Certain: both of the teacher's qualities reach the thresholds of its own class.
    own_class, own_mask = thresholds.values[:, kept.labels - 1]
    certain = (kept.class_quality >= own_class) & (kept.mask_quality >= own_mask)
    # ssis Eq. (ambiguous), its second half: two classifiers together are confident
    # enough. The class may be another one now, so its threshold is too.
    confirmed = corrected.class_quality >= thresholds.values[0, corrected.labels - 1]
    return corrected[certain | confirmed]


def foreground(predictions: PseudoLabels) -> Tensor:
    """o, the probability of not being background, (N,) in [0, 1]."""
    return predictions.distribution.sum(dim=1)


def objects(predictions: PseudoLabels) -> PseudoLabels:
    """One candidate for each object, whatever its class.

    torchvision suppresses within a class: an object may be there as a deer and as a
    bear. Of candidates that overlap, that of the highest foreground quality stays.

    Args:
        predictions: of one image.
    """
    best = nms(predictions.boxes, foreground(predictions), NMS_IOU)
    return predictions[best.sort().values]


def area(predictions: PseudoLabels) -> Tensor:
    """Mask areas, (N,) int64, pixels."""
    return predictions.masks.flatten(1).sum(dim=1)
