r"""PL-DC, instance level: decoupled dual-threshold filtering.

A wrong pseudo-label teaches the student a mistake that it then hands back to the
teacher; a missing one teaches that an object is background. The filter stands between.

Each predicted instance has two qualities, which fail independently: a clean mask of the
wrong class, a right class with a ragged mask:

$$c = \max_k P(k), \qquad
  m = \mathrm{mean}\{p_{xy} : p_{xy} > 0.5\}$$ PL-DC Eq. (quality)

with P the class distribution and p the mask probability. (As in torchvision, a proposal
can be a candidate for two classes; then c is P of the candidate's own class, which is
the largest one whenever it is above one half.) Four rules (`--filter`) say
what is kept:

* `score`, Guided Distillation's: the mask is not asked.

$$c > \tau_{\mathrm{class}}$$ GD Eq. (filter)

* `coupled`, the usual practice: one number, in which a good class makes up for a bad
  mask, and the other way round.

$$c \cdot m \ge \tau_{\mathrm{class}}$$ PL-DC Eq. (coupled)

* `dual`, PL-DC as on arXiv: decoupled, each quality has to pass a threshold of its own.

$$c \ge \tau_{\mathrm{class}} \;\wedge\; m \ge \tau_{\mathrm{mask}}$$ PL-DC Eq. (dual)

* `adaptive`, PL-DC at AAAI: thresholds for each class k that follow the teacher, so
  that a class in which the teacher is never sure is not lost altogether.

$$c \ge T^{\mathrm{class}}_k \;\wedge\; m \ge T^{\mathrm{mask}}_k$$ PL-DC Eq. (adaptive)

The adaptive thresholds start at the frequency of the class among the labeled
instances, rare classes low, and follow the mean quality q of the class:

$$T_k^0 = T_{\mathrm{min}} + (T_{\mathrm{max}} - T_{\mathrm{min}}) \, \frac{n_k}{N}$$
PL-DC Eq. (init)

$$T_k \leftarrow a T_k + (1 - a) \, \bar q_k$$ PL-DC Eq. (adapt)

With one class alone n / N is 1, so the start is T_max: a teacher that is not yet so
sure keeps nothing at first (the run warns). Lower `--tau-max`, or take `--filter dual`.

Differences from the released code: it averages all of the 100 best predictions, most of
them background, so the thresholds sink; each process has its own; a resumed run starts
them anew. Here the mean is over the candidates (class score >= T_min) of all
processes, T stays within [T_min, T_max], and the thresholds are in the checkpoint.

All rules also ask for a mask of more than `min_area` pixels. Read next:
`ssis/correction.py`, which doubts the classes of what is kept.
"""

import torch
from torch import Tensor, nn

from ssis import distributed
from ssis.teacher import PseudoLabels


class Thresholds(nn.Module):
    """PL-DC's adaptive class-aware thresholds; a module for its state dict.

    Args:
        config: `tau_min`, `tau_max`, `threshold_decay`, `filter`.
        classes: C.
    """

    def __init__(self, config, classes: int):
        super().__init__()
        self.used = config.filter == "adaptive"
        self.lowest, self.highest = config.tau_min, config.tau_max
        self.decay = config.threshold_decay
        # Row 0 for the class quality, row 1 for the mask quality.
        self.register_buffer("values", torch.full((2, classes), self.lowest))

    def start(self, frequency: Tensor) -> None:
        """Set all to their first values.

        Args:
            frequency: (C,) share n_k / N of each class among the labeled instances.
        """
        # PL-DC Eq. (init)
        first = self.lowest + (self.highest - self.lowest) * frequency.float()
        self.values.copy_(first.expand_as(self.values))

    @torch.no_grad()
    def update(self, predictions: list[PseudoLabels]) -> None:
        """Follow the teacher; every process must call this in every step.

        Args:
            predictions: of the batch on this process, before the filter.
        """
        if not self.used:
            return
        classes = self.values.shape[1]
        sums = self.values.new_zeros(3, classes)
        for found in predictions:
            # Candidates: what could pass at the lowest threshold. Without this limit
            # the many half-hearted detections would pull every threshold down.
            found = found[found.class_quality >= self.lowest]
            qualities = torch.stack([found.class_quality, found.mask_quality])
            ones = torch.ones_like(qualities[:1])
            sums.index_add_(1, found.labels - 1, torch.cat([qualities, ones]).float())
        sums = distributed.all_sum(sums)
        # A class that nobody saw in this step keeps its thresholds.
        seen = sums[2] > 0
        means = sums[:2] / sums[2].clamp(min=1)
        # PL-DC Eq. (adapt)
        followed = self.decay * self.values + (1 - self.decay) * means
        self.values.copy_(torch.where(seen, followed, self.values))
        self.values.clamp_(self.lowest, self.highest)


def lowest_score(config) -> float:
    """Class score under which no rule keeps anything: the teacher need not paste it."""
    return config.tau_min if config.filter == "adaptive" else config.tau_class


def keep(
    predictions: PseudoLabels, config, thresholds: Thresholds | None = None
) -> PseudoLabels:
    """The predictions of one image that the student is trained on.

    Args:
        predictions: of the teacher.
        config: `filter`, `tau_class`, `tau_mask`, `min_area`.
        thresholds: for the rule "adaptive".
    """
    c, m = predictions.class_quality, predictions.mask_quality  # (N,), (N,)
    if config.filter == "score":
        # GD Eq. (filter)
        good = c > config.tau_class
    elif config.filter == "coupled":
        # PL-DC Eq. (coupled): what the paper replaces.
        good = c * m >= config.tau_class
    elif config.filter == "dual":
        # PL-DC Eq. (dual)
        good = (c >= config.tau_class) & (m >= config.tau_mask)
    else:
        # PL-DC Eq. (adaptive): the thresholds of each one's own class.
        tau_class, tau_mask = thresholds.values[:, predictions.labels - 1]
        good = (c >= tau_class) & (m >= tau_mask)
    # A few pixels are noise, whatever the scores say.
    return predictions[good & (area(predictions) > config.min_area)]


def area(predictions: PseudoLabels) -> Tensor:
    """Mask areas, (N,) int64, pixels."""
    return predictions.masks.flatten(1).sum(dim=1)
