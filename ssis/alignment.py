r"""Category level: pull the class shares of pseudo-labels to those of the annotation.

*This project's; neither paper has it. Known as distribution alignment (ReMixMatch,
Berthelot et al., arXiv 1911.09785).*

A teacher that mistakes one class for another teaches the student to, and follows it
later: a class that is named too often is named more and more often, until the rarer one
may be gone. No threshold sees it, for the teacher is sure. But it is known how often
each class is to be expected: about as often as in the annotated images. So the
probability of each class is multiplied by s_k / m_k, which is above 1 for a class that
is named too seldom, and the result is normalized:

$$\tilde{p}_k = \frac{p_k \, s_k / m_k}{\sum_{k'} p_{k'} \, s_{k'} / m_{k'}}$$
ssis Eq. (alignment)

with s_k the share of class k among the annotated instances, and m_k the share that it
has among the latest pseudo-labels, a running mean of all p over some fifty steps:

$$m_k \leftarrow a \, m_k + (1 - a) \, \bar{p}_k, \qquad a = 0.98$$ ssis Eq. (shares)

The label becomes the argmax, the class quality the maximum. So a class that is named
too often loses those pseudo-labels that are the most doubtful. No class is multiplied
by more than ten, however seldom it is named.

The annotated instances are the labeled ones and, with `--filter calibrated`, those of
the validation images: by chance, twenty labeled images may have a class three times as
often as all images do. It is assumed that the unlabeled images have the classes as
often as the annotated ones, and that the filter keeps about the same part of each
class. Where that is not so, `--no-align`.

Chain: 17 of 24. Read next: `ssis/calibration.py`, which measures what can be measured.
"""

import dataclasses

import torch
from torch import Tensor, nn

from ssis import distributed
from ssis.teacher import PseudoLabels

# a: how slowly m follows. And what a class is multiplied by at most.
DECAY, MOST = 0.98, 10


class Alignment(nn.Module):
    """The class shares of annotated instances and pseudo-labels.

    Args:
        annotated: (C,) how many annotated instances there are of each class.
    """

    def __init__(self, annotated: Tensor):
        super().__init__()
        # One more in all: a class of which there is none is rare, not impossible.
        counts = annotated.float() + 1 / len(annotated)
        self.register_buffer("shares", counts / counts.sum())
        # m: until something was named, nothing is named too often.
        self.register_buffer("named", self.shares.clone())

    @torch.no_grad()
    def update(self, pseudo: list[PseudoLabels]) -> None:
        """Follow what is named; every process must call this in every step.

        Args:
            pseudo: of the batch on this process, aligned or not.
        """
        p = torch.cat([over_foreground(labels) for labels in pseudo])
        sums = distributed.all_sum(torch.cat([p.sum(dim=0), p.new_tensor([len(p)])]))
        # ssis Eq. (shares); without a pseudo-label in any process m stays.
        mean = torch.where(sums[-1] > 0, sums[:-1] / sums[-1].clamp(min=1), self.named)
        self.named.lerp_(mean, 1 - DECAY)

    def forward(self, pseudo: PseudoLabels) -> PseudoLabels:
        """One image's pseudo-labels with aligned labels and class qualities.

        Masks, boxes and the order stay, and so does `distribution`, whose mean `update`
        takes.
        """
        # ssis Eq. (alignment)
        factor = (self.shares / self.named.clamp(min=1e-30)).clamp(max=MOST)
        p = over_foreground(pseudo) * factor
        quality, index = (p / p.sum(dim=1, keepdim=True).clamp(min=1e-30)).max(dim=1)
        return dataclasses.replace(pseudo, labels=index + 1, class_quality=quality)


def over_foreground(pseudo: PseudoLabels) -> Tensor:
    """The class distributions (N, C), divided by their sums: without background."""
    p = pseudo.distribution.float()
    return p / p.sum(dim=1, keepdim=True).clamp(min=1e-30)
