r"""PL-DC, pixel level: uncertainty-weighted mask loss; the loss table.

Mask R-CNN has five losses, and both passes of a step have the same five:

    loss_objectness     RPN: is there an object at this anchor
    loss_rpn_box_reg    RPN: where exactly
    loss_classifier     box head: of which class, or background
    loss_box_reg        box head: where exactly
    loss_mask           mask head: binary cross-entropy per pixel of the 28 x 28 mask

$$L = L_{\mathrm{labeled}} + \lambda_u L_{\mathrm{unlabeled}}$$       GD Eq. (total)

with $\lambda_u$ = `unsup_weight`.

*PL-DC's pixel level* (mask uncertainty awareness). A teacher's mask is good inside and
doubtful along its edge, where its probability p is near one half. In a hard mask a
pixel of p = 0.51 counts as much as one of p = 0.99. So each unlabeled pixel is weighted
by the teacher's confidence in it:

$$u = 1 - 2 |p - 0.5|$$       PL-DC Eq. (uncertainty)

$$L_{\mathrm{mask}} = \mathrm{mean}[(1 - u) \cdot \mathrm{BCE}]$$       PL-DC Eq. (PMUA)

1 - u is 1 where p is 0 or 1, and 0 where it is 0.5. Only the masks' cross-entropy is
weighted, and only on unlabeled images. `teacher.PseudoLabels.target` puts the weights
into the targets (with `--refine-calibrate` times m' of ssis Eq. (calibration)), and
`model.WeightedRoIHeads.forward` aligns them with each proposal. The mean is over all
pixels; it is not divided by the sum of the weights. So if the teacher is unsure of all
masks of a batch, the mask loss of the batch is small.

*No-object weight.* In all three papers a query that matches no instance is taught "no
object" at a tenth of the weight of an instance (0.1 in Mask2Former), in a weighted
mean:

$$L_{\mathrm{class}} = \frac{\sum_i w_i \, \mathrm{CE}_i}{\sum_i w_i}, \qquad
  w_i = w_0 \; \text{for background}, \; 1 \; \text{otherwise}$$ GD Eq. (no object)

So an object that the filter dropped is punished as background at a tenth. Here w_0 is
`no_object_labeled` and `no_object_unlabeled`, one for each pass, and weighs the sampled
background anchors of the RPN and the sampled background proposals of the classifier.
But Mask R-CNN *samples* its background, at least three for each foreground proposal,
while Mask2Former takes all of its hundred queries, so the same number is another weight
here (docs/differences.md).

*Averaging.* Each loss is a mean over n things: sampled anchors, sampled proposals, or
foreground proposals; of the two weighted ones n is the sum of the weights. n differs
between processes: one with many instances has more foreground proposals. DDP takes the
mean of the processes' gradients, in which each process counts the same. For the
gradient of the mean over the *global* batch, each process's loss is first multiplied by

$$\frac{n_{\mathrm{rank}} \cdot \mathrm{world\_size}}{n_{\mathrm{total}}}$$

With this factor a process without pseudo-labels (n = 0) counts for nothing. On one
process the factor is 1.

Chain: 19 of 24. Read next: `ssis/sam_distill.py`, the one loss beside these five.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ssis import distributed

# Loss -> the index of its n in the counts of `model.MaskRCNN`: the weights of the
# sampled anchors and their number, the weights of the sampled proposals and their
# number, and the number of foreground proposals. Both box losses sum over foreground
# alone, but divide by the number of all samples.
COUNT_OF = {
    "loss_objectness": 0,
    "loss_rpn_box_reg": 1,
    "loss_classifier": 2,
    "loss_box_reg": 3,
    "loss_mask": 4,
}
COUNTS = 5


def weighted_mean(each: Tensor, labels: Tensor, no_object: float) -> tuple:
    """GD Eq. (no object): a mean in which background counts `no_object` times.

    Args:
        each: (n,) losses of the samples.
        labels: (n,) of the samples; 0 is background.
        no_object: w_0, in [0, 1].

    Returns:
        The mean, 0 without any weight, and the sum of the weights: two scalars.
    """
    weights = torch.where(labels > 0, 1.0, no_object)  # (n,)
    count = weights.sum()
    return (weights * each).sum() / count.clamp(min=1e-6), count


def certainty(mask_probs: Tensor) -> Tensor:
    """A teacher's confidence in each pixel: 1 - u, the weight of the pixel's loss.

    Args:
        mask_probs: any shape, in [0, 1].

    Returns:
        The same shape, in [0, 1].
    """
    # PL-DC Eq. (uncertainty): 1 - u = 1 - (1 - 2 |p - 0.5|), where the ones cancel.
    return 2 * (mask_probs - 0.5).abs()


def mask_loss(
    logits: Tensor, labels: Tensor, targets: Tensor, weights: Tensor | None
) -> Tensor:
    """Mask R-CNN's mask loss, with a weight for each pixel.

    Args:
        logits: (P, C + 1, M, M) of the foreground proposals; M = 28.
        labels: (P,) int64, 1..C. Only the mask of this class is trained.
        targets: (P, M, M) float in [0, 1], masks to learn, in the proposals' frames.
        weights: (P, M, M) float in [0, 1], aligned as `targets` are; None: all are 1.

    Returns:
        A scalar; 0 without any proposal.
    """
    if len(labels) == 0:
        # 0, but not a constant: DDP waits for a gradient of every parameter.
        return logits.sum() * 0.0
    # Mask R-CNN predicts a mask for each class, and only the mask of the target's class
    # is trained. Classes do not compete for pixels; the box head decides the class.
    own = logits[torch.arange(len(labels), device=logits.device), labels]
    # PL-DC Eq. (PMUA). The mean is over all pixels. Divided by the sum of the weights,
    # a batch of unsure masks would count as much as a batch of confident ones.
    return F.binary_cross_entropy_with_logits(own, targets, weights)


def total(
    losses: dict[str, Tensor], counts: Tensor, total_counts: Tensor, world_size: int
) -> Tensor:
    """The sum of a pass's losses, to be averaged by DDP into the global mean.

    Args:
        losses: the five scalars of this process.
        counts: (5,) float, what they were averaged over on this process.
        total_counts: (5,) float, the sum of `counts` over all processes.
        world_size: number of processes.

    Returns:
        A scalar; the mean of it over the processes is the loss of the global batch.
    """
    # A batch without any instance anywhere has n = 0 and loss 0: no 0 / 0.
    factor = counts * world_size / total_counts.clamp(min=1e-6)
    return sum(losses[name] * factor[index] for name, index in COUNT_OF.items())


def logged(
    losses: dict[str, Tensor] | None, counts: Tensor, prefix: str
) -> dict[str, Tensor]:
    """The row of one pass in the loss table: sums of this process, under fixed names.

    A pass that was skipped gives zeros under the same names. So all processes have the
    same names in a step, and their tables can be added up.

    Args:
        losses: the five scalars; None: the pass was skipped.
        counts: (5,) float, what they were averaged over.
        prefix: "labeled/" or "unlabeled/".

    Returns:
        For each loss, a (2,) tensor [loss * n, n]; the sums over processes and steps
        give the mean.
    """
    row = {}
    for name, index in COUNT_OF.items():
        value = (
            torch.zeros_like(counts[0])
            if losses is None
            else losses[name].detach().float()
        )
        row[prefix + name] = torch.stack([value * counts[index], counts[index]])
    return row


def entry(number: float, count: int, device) -> Tensor:
    """Two numbers that the host knows, as a value of the loss table: (2,) float32.

    Filled in on the GPU: to copy them there, the host would have to wait for it.
    """
    return torch.stack(
        [torch.full((), float(n), device=device) for n in (number, count)]
    )


def means(table: dict[str, Tensor]) -> dict[str, float]:
    """The loss table of some steps, over all processes.

    Args:
        table: sums of rows: name -> (2,) tensor [loss * n, n] of this process.

    Returns:
        name -> mean; 0 for a loss that was computed on nothing. All are finite, since
        the rows of steps that were not are removed (`ssis/engine/guard.py`).
    """
    # One collective call for the whole table.
    sums = distributed.all_sum(torch.stack([value.float() for value in table.values()]))
    return {
        name: round(value / count, 6) if count else 0.0
        for name, (value, count) in zip(table, sums.tolist(), strict=True)
    }
