r"""Calibration: thresholds, gate and trust are measured, not guessed.

*This project's; neither paper has it.*

A threshold that is right on drawings lets false positives through on photographs; SAM
may outline animals better than a teacher does, and blood cells worse; a category
classifier is a help on one dataset and harm on another. All three can be measured
before the student is taught: on the *validation images*, whose ground truth is known
and which no model is trained on. (The labeled images will not do: the teacher knows
them by heart, and is right on nearly all of them.) With `--filter calibrated` the
teacher labels the validation images as it labels unlabeled ones, and every instance
that it predicts is compared with the ground truth. It is *found* if its box lies on an
instance (IoU >= 0.5, `data.match`), one prediction for each instance.

*Thresholds of the foreground quality.* The precision at a threshold is the fraction of
the predictions above it that are found. (Not: found and right. A class can be corrected
later, but a box where nothing is cannot.) Few validation images give rough fractions,
so imagined predictions are added: for all classes together κ of them, found with
probability T, as if the foreground quality could be believed; for each class κ more,
found with probability π(T). Each class gets the lowest threshold that reaches the
precision asked for, `--target-precision`:

$$\pi_k(T) = \frac{F_k(T) + \kappa \pi(T)}{N_k(T) + \kappa}, \qquad
  \pi(T) = \frac{F(T) + \kappa T}{N(T) + \kappa}, \qquad
  T_k = \min \{T : \pi_k(T) \ge \pi^*\}$$ ssis Eq. (precision)

with N_k(T) predictions of class k whose foreground quality reaches T, F_k(T) of them
found, and N, F of all classes. A class without any prediction is held to the threshold
of all.

*Threshold of the mask quality.* The same, over the found instances that pass the first
threshold, one for all classes; a mask is right if its IoU with the true mask reaches
one half.

*Gate.* SAM's mask is taken where it agrees with the teacher's (`ssis/refine.py`). How
much agreement is enough? Over the instances that pass the thresholds, a gate g gains

$$G(g) = \frac{1}{N} \sum_{n : a_n \ge g}
  (\mathrm{IoU}^{SAM}_n - \mathrm{IoU}^T_n)$$ ssis Eq. (gate)

with a_n the agreement, and the IoUs those with the true mask. The gate of the largest
gain is taken, if the gain is more than twice its standard error; otherwise the
refinement is off.

*Trust.* The category classifier's weight in PL-DC Eq. (DICC) starts at one half and
falls to 0, whether it knows better than the teacher or not. Here it is measured, as
long as the run goes on:

$$w = \mathrm{argmax}_{w \in \{0, 0.1, \ldots, 1\}} \;
  |\{n : \mathrm{argmax}_k \, p_k(w) = y_n\}|$$ ssis Eq. (trust)

the weight with which most of the found instances that pass the thresholds get their
true class y_n, the smallest of several that are equal; at 0 the correction is off.

Measured when the first teacher is ready, when the burn-in ends, and after each
evaluation but the last, since the teacher changes. What was measured is printed, and in
the report. Where the validation part is also the test part, the test's ground truth
decides what is kept: the run then says so.

Chain: 13 of 19. Read next: `ssis/losses.py`, what the student learns from all this.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ssis import data, distributed, refine
from ssis.filters import LOWEST, area, foreground, objects
from ssis.model import autocast
from ssis.teacher import predict

# kappa: how many imagined predictions the measured ones have to outweigh.
IMAGINED = 10
# The thresholds and gates that are tried, and the weights of the category classifier.
TRIED = torch.arange(LOWEST, 0.995, 0.01)
GATES = torch.arange(0, 1, 0.05)
WEIGHTS = torch.arange(11) / 10
# A gate that no agreement reaches: the refinement is off.
OFF = 2.0
# A mask is right from this IoU with the true one on.
RIGHT_MASK = 0.5


class Calibration:
    """What was measured last, beside the thresholds (`filters.Thresholds`).

    Args:
        gate: g, agreement from which SAM's mask is taken, until something is measured.
        trust: w, the weight of the category classifier; None: that of PL-DC Eq. (w).
    """

    def __init__(self, gate: float, trust: float | None = None):
        self.gate, self.trust = gate, trust

    def state_dict(self) -> dict:
        """What a checkpoint must keep."""
        return dict(gate=self.gate, trust=self.trust)

    def load_state_dict(self, state: dict) -> None:
        """Take up what `state_dict` gave."""
        self.gate, self.trust = state["gate"], state["trust"]


@dataclass
class Instances:
    """Predicted instances of the validation images, all on the CPU.

    Attributes:
        labels: (N,) int64, 1..C, by the teacher.
        foreground, mask_quality: (N,) in [0, 1].
        true_labels: (N,) int64, of the instance that it lies on; 0 for none.
        mask_iou: (N,) in [0, 1], of the teacher's mask with the true one; 0 for none.
        agreement: (N,) in [0, 1], of SAM's mask with the teacher's.
        refined_iou: (N,) in [0, 1], of SAM's mask with the true one.
        distribution: (N, C), the teacher's.
        opinion: (N, C), the category classifier's; all 0 where it has none.
    """

    labels: Tensor
    foreground: Tensor
    mask_quality: Tensor
    true_labels: Tensor
    mask_iou: Tensor
    agreement: Tensor
    refined_iou: Tensor
    distribution: Tensor
    opinion: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, keep: Tensor) -> "Instances":
        """The instances that a bool mask selects."""
        return Instances(*(getattr(self, f.name)[keep] for f in fields(self)))


@torch.no_grad()
def look(labeler, items: Iterable[dict], config) -> tuple[Instances, int, int]:
    """What the teacher, SAM and the category classifier make of validation images.

    Every process must call this.

    Args:
        labeler: `engine.build.Labeler`.
        items: validation images of this process, of a `data.Stream` with targets.
        config: the settings of the refinement.

    Returns:
        The instances of all processes, how many images, and how many true instances.
    """
    device = next(labeler.teacher.parameters()).device
    parts, images, instances = [], 0, 0
    for item in items:
        image, target = item["image"].to(device), item["target"]
        with autocast(config, device):
            predicted = predict(labeler.teacher, [image], LOWEST)[0]
        predicted = refined = objects(predicted[area(predicted) > config.min_area])
        if config.refine != "none":
            # Without a gate, and uncalibrated: SAM's masks as they are.
            how = (config.refine, config.refine_points, config.refine_sampling)
            how += (0.0, False, config.min_area)
            refined = refine.refine(predicted, labeler.val_embeddings, item, *how)
        opinion = torch.zeros_like(predicted.distribution)
        if labeler.classifier:
            opinion = labeler.classifier(image, refined)
        partner = data.match(predicted.boxes, target["boxes"])
        found = partner >= 0
        # An image without instances has no true mask to be compared with.
        size = (len(partner), *target["masks"].shape[1:])
        true = torch.zeros(size, dtype=torch.bool)
        labels = torch.zeros(len(partner), dtype=torch.int64)
        true[found] = target["masks"].bool()[partner[found]]
        labels[found] = target["labels"][partner[found]]
        masks, redrawn = predicted.masks.cpu(), refined.masks.cpu()
        columns = (predicted.labels, foreground(predicted), predicted.mask_quality)
        columns += (labels, data.mask_iou(masks, true))
        columns += (data.mask_iou(masks, redrawn), data.mask_iou(redrawn, true))
        columns += (predicted.distribution, opinion)
        parts.append([column.cpu() for column in columns])
        images += 1
        instances += len(target["labels"])
    gathered = distributed.gather((parts, images, instances))
    rows = [part for mine, _, _ in gathered for part in mine]
    everything = Instances(*(torch.cat(column) for column in zip(*rows, strict=True)))
    return everything, sum(g[1] for g in gathered), sum(g[2] for g in gathered)


def lowest_reaching(precision: Tensor, target: float) -> Tensor:
    """The lowest of the thresholds tried that reaches a precision.

    Args:
        precision: (.., len(TRIED)).
        target: in [0, 1].

    Returns:
        (..), the highest threshold where none reaches it.
    """
    reached = precision >= target
    reached[..., -1] = True
    # `max` gives the first of several largest values, so the first True.
    return TRIED[reached.int().max(dim=-1).indices]


def precision(quality: Tensor, found: Tensor, imagined: Tensor) -> Tensor:
    """One line of ssis Eq. (precision), at each of the thresholds tried.

    Args:
        quality: (N,) in [0, 1].
        found: (N,) bool.
        imagined: (len(TRIED),) precision of the imagined predictions.
    """
    passing = quality[:, None] >= TRIED  # (N, thresholds)
    n, f = passing.sum(dim=0), (passing & found[:, None]).sum(dim=0)
    # ssis Eq. (precision)
    return (f + IMAGINED * imagined) / (n + IMAGINED)


def found_thresholds(seen: Instances, classes: int, target: float) -> Tensor:
    """T_k of ssis Eq. (precision), (C,)."""
    found = seen.true_labels > 0
    of_all = precision(seen.foreground, found, TRIED)
    of_each = [
        precision(seen.foreground[own], found[own], of_all)
        for own in (seen.labels == k + 1 for k in range(classes))
    ]
    return lowest_reaching(torch.stack(of_each), target)


def mask_threshold(passed: Instances, target: float) -> float:
    """The mask quality from which on masks are right, by ssis Eq. (precision)."""
    found = passed[passed.true_labels > 0]
    right = found.mask_iou >= RIGHT_MASK
    return lowest_reaching(precision(found.mask_quality, right, TRIED), target).item()


def best_gate(passed: Instances) -> float:
    """g of the largest gain of ssis Eq. (gate), or OFF."""
    gain = passed.refined_iou - passed.mask_iou  # (N,)
    if len(gain) < 2:
        return OFF
    # ssis Eq. (gate)
    taken = gain * (passed.agreement >= GATES[:, None])  # (gates, N)
    mean, error = taken.mean(dim=1), taken.std(dim=1) / len(gain) ** 0.5
    best = mean.argmax()
    return GATES[best].item() if mean[best] > 2 * error[best] else OFF


def best_trust(passed: Instances) -> float:
    """w of ssis Eq. (trust)."""
    found = passed[(passed.true_labels > 0) & (passed.opinion.sum(dim=1) > 0)]
    teacher = found.distribution / found.distribution.sum(dim=1, keepdim=True)
    # ssis Eq. (trust): PL-DC Eq. (DICC) with each of the weights.
    mixed = [w * found.opinion + (1 - w) * teacher for w in WEIGHTS]
    right = [(p.argmax(dim=1) + 1 == found.true_labels).sum() for p in mixed]
    # `argmax` gives the first of several largest values, so the smallest weight.
    return WEIGHTS[torch.stack(right).argmax()].item()


def calibrate(labeler, looked: tuple[Instances, int, int], target: float) -> dict:
    """Set thresholds, gate and trust by what was seen.

    Args:
        labeler: `engine.build.Labeler`; its thresholds and calibration are changed.
        looked: of `look`.
        target: precision that the kept pseudo-labels shall have, in [0, 1].

    Returns:
        What was measured, for the terminal and the report: numbers, and a list of C.
    """
    (seen, images, instances), measured = looked, labeler.calibration
    classes = seen.distribution.shape[1]
    of_class = found_thresholds(seen, classes, target)
    passed = seen[seen.foreground >= of_class[seen.labels - 1]]
    of_mask = mask_threshold(passed, target)
    passed = passed[passed.mask_quality >= of_mask]
    mask_row = torch.full_like(of_class, of_mask)
    labeler.thresholds.values.copy_(torch.stack([of_class, mask_row]))
    measured.gate, measured.trust = best_gate(passed), best_trust(passed)

    # What the stages are worth now, beside what was decided.
    found = passed[passed.true_labels > 0]
    differ = found[found.opinion.sum(dim=1) > 0]
    differ = differ[differ.opinion.argmax(dim=1) + 1 != differ.labels]
    by_classifier = differ.opinion.argmax(dim=1) + 1 == differ.true_labels

    def mean(values: Tensor) -> float | None:
        return round(values.float().mean().item(), 4) if len(values) else None

    return dict(
        images=images,
        found_thresholds=[round(t, 4) for t in of_class.tolist()],
        mask_threshold=round(of_mask, 4),
        kept=len(passed),
        precision=mean(passed.true_labels > 0),
        class_accuracy=mean(found.labels == found.true_labels),
        recall=round(len(found) / max(instances, 1), 4),
        mask_iou=mean(found.mask_iou),
        refined_iou=mean(found.refined_iou),
        gate=round(measured.gate, 4),
        disagreements=len(differ),
        classifier_right=by_classifier.sum().item(),
        teacher_right=(differ.labels == differ.true_labels).sum().item(),
        trust=round(measured.trust, 4),
    )
