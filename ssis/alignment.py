r"""Category level: pseudo-labels keep the class shares of the annotated images.

*This project's; neither paper has it. Known as distribution alignment (ReMixMatch,
Berthelot et al., arXiv 1911.09785).*

A teacher that mistakes one class for another teaches the student to, and follows it
later: a class that is named too often is named more and more often, and in the end the
rarer one is gone. No threshold sees it, for the teacher is sure. But it is known how
often each class is to be expected: about as often as in the annotated images. So the
class distribution of a pseudo-label is multiplied by what its classes have too little,
and divided by its sum:

$$\tilde{p}_k = \frac{p_k \, s_k / m_k}{\sum_l p_l \, s_l / m_l}$$ ssis Eq. (alignment)

with s_k the share of class k among the annotated instances, and m_k what it has among
the pseudo-labels of the last hundred steps or so, a running mean of all p:

$$m \leftarrow a \, m + (1 - a) \, \bar{p}, \qquad a = 0.99$$ ssis Eq. (shares)

The label becomes the argmax, the class quality the maximum. So a class that is named
too often loses those pseudo-labels that are doubtful anyway; where the teacher is sure,
the label stays.

The annotated instances are the labeled ones and, with `--filter calibrated`, those of
the validation images, for twenty labeled images alone may have a class four times as
often as the others do. It is assumed that the unlabeled images have the classes as
often as the annotated ones, and that the filter keeps all classes alike, as the
calibrated one does, which asks only whether something is there. Where that is not so,
`--no-align`.

Chain: 13 of 20. Read next: `ssis/calibration.py`, which measures all of these.
"""

import dataclasses

import torch
from torch import Tensor, nn

from ssis import distributed
from ssis.teacher import PseudoLabels

# a: how slowly m follows.
DECAY = 0.99
# Less than this no m_k is taken to be: a class that is hardly ever named would be
# multiplied by anything.
LEAST = 0.01


class Alignment(nn.Module):
    """The class shares of annotated instances and pseudo-labels.

    Args:
        annotated: (C,) how many annotated instances there are of each class.
    """

    def __init__(self, annotated: Tensor):
        super().__init__()
        # One more of each: a class of which there is none is rare, not impossible.
        counts = annotated.float() + 1
        self.register_buffer("shares", counts / counts.sum())
        # Until something was named, nothing is named too often.
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
        p = over_foreground(pseudo) * self.shares / self.named.clamp(min=LEAST)
        quality, index = (p / p.sum(dim=1, keepdim=True).clamp(min=1e-30)).max(dim=1)
        return dataclasses.replace(pseudo, labels=index + 1, class_quality=quality)


def over_foreground(pseudo: PseudoLabels) -> Tensor:
    """The class distributions (N, C), divided by their sums: without background."""
    p = pseudo.distribution.float()
    return p / p.sum(dim=1, keepdim=True).clamp(min=1e-30)
