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
the largest one whenever it is above one half.) Four rules (`--filter`) say
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

The adaptive thresholds start at the frequency of the class among the labeled
instances, rare classes low, and follow the mean quality q of the class:

$$T_k^0 = T_{\mathrm{min}} + (T_{\mathrm{max}} - T_{\mathrm{min}}) \, \frac{n_k}{N}$$
PL-DC Eq. (init)

$$T_k \leftarrow a T_k + (1 - a) \, \bar q_k$$ PL-DC Eq. (adapt)

With a single class n / N is 1, so the thresholds start at T_max: a teacher that is less
confident keeps nothing at first (the run warns). Lower `--tau-max`, or take
`--filter dual`.

Differences from the released code: it averages all of the 100 best predictions, most of
them background, so the thresholds sink; each process has its own; a resumed run starts
them anew. Here the mean is over the candidates (class score >= T_min) of all
processes, T stays within [T_min, T_max], and the thresholds are in the checkpoint.

All rules also ask for a mask of more than `min_area` pixels.

What a missing pseudo-label teaches depends on the image. If the image has others, the
dropped object is trained as background, at full weight: to Mask R-CNN, an anchor or
proposal that matches no instance *is* background. If the image has none, it is left out
of the step and teaches nothing (`train.unlabeled_pass`); otherwise an unsure teacher
would teach that the world is empty. The papers' models differ here: they teach "no
object" at a tenth of the weight (`docs/differences.md`).

Chain: 6 of 16. Read next: `ssis/sam.py`, which redraws the masks of what is kept.
"""

import torch
from torch import Tensor, nn

from ssis import distributed
from ssis.teacher import PseudoLabels


class Thresholds(nn.Module):
    """PL-DC's adaptive class-aware thresholds; a module for its state dict.

    Args:
        classes: C.
        lowest, highest: T_min and T_max, in [0, 1].
        decay: a, in [0, 1]; how slowly the thresholds follow.
    """

    def __init__(self, classes: int, lowest: float, highest: float, decay: float):
        super().__init__()
        self.lowest, self.highest, self.decay = lowest, highest, decay
        # Row 0 for the class quality, row 1 for the mask quality.
        self.register_buffer("values", torch.full((2, classes), self.lowest))

    def start(self, frequency: Tensor) -> None:
        """Set all to their first values.

        Args:
            frequency: (C,) in [0, 1], the fraction n_k / N of each class among the
                labeled instances.
        """
        # PL-DC Eq. (init). The same for both rows, class quality and mask quality.
        first = self.lowest + (self.highest - self.lowest) * frequency.float()
        self.values.copy_(first.expand_as(self.values))

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
            candidates = image[image.class_quality >= self.lowest]
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
        self.values.copy_(torch.where(seen, followed, self.values))
        self.values.clamp_(self.lowest, self.highest)


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
        rule: "score", "coupled", "dual" or "adaptive".
        tau_class: threshold of the class quality, or of the product, in [0, 1].
        tau_mask: threshold of the mask quality, for "dual", in [0, 1].
        min_area: pixels; a mask needs more.
        thresholds: for the rule "adaptive".

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
    elif rule == "adaptive":
        # PL-DC Eq. (adaptive): each instance against the thresholds of its own class.
        own_class, own_mask = thresholds.values[:, predictions.labels - 1]
        good = (c >= own_class) & (m >= own_mask)
    else:
        raise ValueError(f"no rule {rule!r}: score, coupled, dual or adaptive")
    # A few pixels are noise, whatever the scores say.
    return predictions[good & (area(predictions) > min_area)]


def area(predictions: PseudoLabels) -> Tensor:
    """Mask areas, (N,) int64, pixels."""
    return predictions.masks.flatten(1).sum(dim=1)
