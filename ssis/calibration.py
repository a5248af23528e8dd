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
instance (IoU >= 0.5, `targets.match`), one prediction for each instance.

*Thresholds of the foreground quality.* A threshold that is too low teaches objects
where there are none, one that is too high teaches that objects are background. F1, the
harmonic mean of precision and recall, weighs both. (For both it is enough that an
instance is *found*; its class may be wrong. A class can be corrected later, a box
around nothing cannot.) Each class gets the threshold of the highest F1. With few
validation images the counts of one class are rough, so those of all classes together
are added to each, scaled as if they were κ instances:

$$\mathrm{F1}_k(T) = \frac{2 \, (F_k(T) + \lambda F(T))}
  {N_k(T) + M_k + \lambda (N(T) + M)}, \qquad \lambda = \frac{\kappa}{M}, \qquad
  T_k = \mathrm{argmax}_T \, \mathrm{F1}_k(T)$$ ssis Eq. (F1)

with N_k(T) predictions of class k whose foreground quality reaches T, F_k(T) of them
found, M_k true instances of class k, and N, F, M those of all classes. Of several
thresholds with the highest F1 it is the median.

*Threshold of the mask quality.* One threshold for all classes, again that of the
highest F1. It is measured on the found instances that pass the first threshold; a mask
is right if its IoU with the true mask reaches one half.

*Gate.* SAM's mask is taken where it agrees with the teacher's (`ssis/refine.py`). How
much agreement is enough? Over the instances that pass the thresholds, a gate g gains

$$G(g) = \frac{1}{N} \sum_{n : a_n \ge g}
  (\mathrm{IoU}^{SAM}_n - \mathrm{IoU}^T_n)$$ ssis Eq. (gate)

with a_n the agreement, and the IoUs those with the true mask. The gate of the largest
gain is taken, if the gain is more than twice its standard error; otherwise the
refinement is off.

*Trust.* The category classifier's weight in PL-DC Eq. (DICC) starts at one half and
falls to 0, whether it knows better than the teacher or not. Here it is measured, again
and again during the run:

$$w = \mathrm{argmax}_{w \in \{0, 0.1, \ldots, w_{\mathrm{max}}\}} \;
  \sum_n \log p_{y_n}(w)$$ ssis Eq. (trust)

the weight with which the true classes y_n of the found instances that pass the
thresholds are most likely. (Counting which classes are right would let three
disagreements decide.) At 0 the correction is off. At weights near 1 the classifier
decides alone. That has to be earned: a teacher that is sure of a few wrong classes
makes a classifier that is less sure look better than it is. Only the instances on which
the two disagree show who knows better. There a sign test at two standard errors
decides:

$$w_{\mathrm{max}} = 1 \;\mathrm{if}\; R_c - R_t > 2 \sqrt{R_c + R_t}, \;
  \mathrm{else}\; \tfrac{1}{2}$$ ssis Eq. (overrule)

with R_c and R_t how often the classifier and the teacher are right there. On
photographs of animals it is 17 to 3, on blood cells 2 to 6 (one run of each;
docs/results/log-overrule.txt). One half is where PL-DC starts.

Measured when the first teacher is ready, when the burn-in ends, and after each
evaluation but the last, since the teacher changes. What was measured is printed, and in
the report. Where the validation part is also the test part, the test's ground truth
decides what is kept: the run then says so.

Chain: 18 of 24. Read next: `ssis/losses.py`, what the student learns from all this.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ssis import distributed, refine
from ssis.filters import LOWEST, area, foreground, objects
from ssis.model import autocast
from ssis.targets import mask_iou, match
from ssis.teacher import predict

# kappa: as how many instances all classes together count in each class.
SHARED = 10
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
        opinion: (N, C), the category classifier's under the teacher's mask; all 0 where
            it has none.
        refined_opinion: (N, C), the same under SAM's mask.
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
    refined_opinion: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, keep: Tensor) -> "Instances":
        """The instances that a bool mask selects."""
        return Instances(*(getattr(self, f.name)[keep] for f in fields(self)))


@torch.no_grad()
def look(labeler, items: Iterable[dict], config) -> tuple[Instances, int, Tensor]:
    """What the teacher, SAM and the category classifier make of validation images.

    Every process must call this.

    Args:
        labeler: `engine.build.Labeler`.
        items: validation images of this process, of a `data.Stream` with targets.
        config: the settings of the refinement.

    Returns:
        The instances of all processes, how many images, and (C,) how many true
        instances of each class.
    """
    device = next(labeler.teacher.parameters()).device
    parts, images, instances = [], 0, 0
    classes = labeler.thresholds.values.shape[1]
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
        opinion = refined_opinion = torch.zeros_like(predicted.distribution)
        if labeler.classifier:
            opinion = refined_opinion = labeler.classifier(image, predicted)
            if config.refine != "none":
                refined_opinion = labeler.classifier(image, refined)
        partner = match(predicted.boxes, target["boxes"])
        found = partner >= 0
        # An image without instances has no true mask to be compared with.
        size = (len(partner), *target["masks"].shape[1:])
        true = torch.zeros(size, dtype=torch.bool)
        labels = torch.zeros(len(partner), dtype=torch.int64)
        true[found] = target["masks"].bool()[partner[found]]
        labels[found] = target["labels"][partner[found]]
        masks, redrawn = predicted.masks.cpu(), refined.masks.cpu()
        columns = (predicted.labels, foreground(predicted), predicted.mask_quality)
        columns += (labels, mask_iou(masks, true))
        columns += (mask_iou(masks, redrawn), mask_iou(redrawn, true))
        columns += (predicted.distribution, opinion, refined_opinion)
        parts.append([column.cpu() for column in columns])
        images += 1
        instances += torch.bincount(target["labels"] - 1, minlength=classes)
    gathered = distributed.gather((parts, images, instances))
    rows = [part for mine, _, _ in gathered for part in mine]
    everything = Instances(*(torch.cat(column) for column in zip(*rows, strict=True)))
    return everything, sum(g[1] for g in gathered), sum(g[2] for g in gathered)


def counts(quality: Tensor, found: Tensor) -> Tensor:
    """F and N of ssis Eq. (F1), at each of the thresholds tried.

    Args:
        quality: (N,) in [0, 1].
        found: (N,) bool.

    Returns:
        (2, len(TRIED)).
    """
    passing = quality[:, None] >= TRIED  # (N, thresholds)
    return torch.stack([(passing & found[:, None]).sum(dim=0), passing.sum(dim=0)])


def best_threshold(found: Tensor, kept: Tensor, instances: Tensor | float) -> float:
    """The threshold of the highest F1.

    Args:
        found, kept: (len(TRIED),) F and N at each of the thresholds tried.
        instances: M.
    """
    # ssis Eq. (F1)
    f1 = 2 * found / (kept + instances + 1e-9)
    # Between the last wrong prediction and the first right one all are as good.
    return TRIED[f1 == f1.max()].median().item()


def found_thresholds(seen: Instances, instances: Tensor) -> Tensor:
    """T_k of ssis Eq. (F1), (C,).

    Args:
        seen: the predictions.
        instances: (C,) M_k, true instances of each class.
    """
    found = seen.true_labels > 0
    of_all, total = counts(seen.foreground, found), instances.sum()
    share = SHARED / total.clamp(min=1)
    thresholds = []
    for k, own_total in enumerate(instances):
        own = seen.labels == k + 1
        both = counts(seen.foreground[own], found[own]) + share * of_all
        thresholds.append(best_threshold(*both, own_total + share * total))
    return torch.tensor(thresholds)


def mask_threshold(passed: Instances) -> float:
    """The mask quality from which on masks are right, by ssis Eq. (F1)."""
    found = passed[passed.true_labels > 0]
    right = found.mask_iou >= RIGHT_MASK
    return best_threshold(*counts(found.mask_quality, right), right.sum())


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


def disputed(found: Instances) -> tuple[int, int, int]:
    """Instances that classifier and teacher name differently: how many, R_c, R_t."""
    differ = found[found.opinion.sum(dim=1) > 0]
    differ = differ[differ.opinion.argmax(dim=1) + 1 != differ.labels]
    by_classifier = differ.opinion.argmax(dim=1) + 1 == differ.true_labels
    by_teacher = differ.labels == differ.true_labels
    return len(differ), by_classifier.sum().item(), by_teacher.sum().item()


def largest_trust(by_classifier: int, by_teacher: int) -> float:
    """w_max, given R_c and R_t."""
    # ssis Eq. (overrule)
    deviation = (by_classifier + by_teacher) ** 0.5
    return 1.0 if by_classifier - by_teacher > 2 * deviation else 0.5


def best_trust(passed: Instances) -> float:
    """w of ssis Eq. (trust)."""
    found = passed[(passed.true_labels > 0) & (passed.opinion.sum(dim=1) > 0)]
    teacher = found.distribution / found.distribution.sum(dim=1, keepdim=True)
    weights = WEIGHTS[WEIGHTS <= largest_trust(*disputed(found)[1:])]
    # ssis Eq. (trust): PL-DC Eq. (DICC) with each of the weights.
    mixed = [w * found.opinion + (1 - w) * teacher for w in weights]
    true = (torch.arange(len(found)), found.true_labels - 1)
    likelihood = [p[true].clamp(min=1e-6).log().sum() for p in mixed]
    return weights[torch.stack(likelihood).argmax()].item()


def calibrate(labeler, seen: Instances, images: int, instances: Tensor) -> dict:
    """Set thresholds, gate and trust by what was seen.

    Args:
        labeler: `engine.build.Labeler`; its thresholds and calibration are changed.
        seen, images, instances: of `look`.

    Returns:
        What was measured, for the terminal and the report: numbers, and a list of C.
    """
    measured, of_class = labeler.calibration, found_thresholds(seen, instances)
    passed = seen[seen.foreground >= of_class[seen.labels - 1]]
    of_mask = mask_threshold(passed)
    passed = passed[passed.mask_quality >= of_mask]
    mask_row = torch.full_like(of_class, of_mask)
    labeler.thresholds.values.copy_(torch.stack([of_class, mask_row]))
    measured.gate = best_gate(passed)
    # The classifier will see SAM's mask where it is taken, and else the teacher's.
    taken = (passed.agreement >= measured.gate)[:, None]
    passed.opinion = torch.where(taken, passed.refined_opinion, passed.opinion)
    measured.trust = best_trust(passed)

    # What the stages are worth now, beside what was decided.
    found = passed[passed.true_labels > 0]
    disagreements, classifier_right, teacher_right = disputed(found)

    def mean(values: Tensor) -> float | None:
        return round(values.float().mean().item(), 4) if len(values) else None

    shares = {}
    if aligned := labeler.alignment:
        of = dict(annotated_shares=aligned.shares, named_shares=aligned.named)
        shares = {k: [round(x, 4) for x in v.tolist()] for k, v in of.items()}
    return dict(
        images=images,
        found_thresholds=[round(t, 4) for t in of_class.tolist()],
        mask_threshold=round(of_mask, 4),
        kept=len(passed),
        precision=mean(passed.true_labels > 0),
        class_accuracy=mean(found.labels == found.true_labels),
        recall=round(len(found) / max(instances.sum().item(), 1), 4),
        mask_iou=mean(found.mask_iou),
        refined_iou=mean(found.refined_iou),
        gate=round(measured.gate, 4),
        taken=mean(passed.agreement >= measured.gate),
        disagreements=disagreements,
        classifier_right=classifier_right,
        teacher_right=teacher_right,
        trust=round(measured.trust, 4),
        **shares,
    )
