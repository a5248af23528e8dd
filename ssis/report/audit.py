r"""How good are the pseudo-labels, when the ground truth is known.

The final AP says whether a method worked; the audit says why. On some unlabeled images
whose annotations were hidden from training, the teacher's kept pseudo-labels are
compared with the ground truth:

    pseudo_per_image    kept instances, against labeled_per_image, the density to expect
    box_precision       fraction of them that lie on an instance (box IoU >= 0.5)
    class_accuracy      fraction of the found ones that have their class
    mask_iou            mean mask IoU of the found ones
    recall              fraction of the instances that some pseudo-label lies on

Fractions are in [0, 1]; a fraction of nothing is None.

These are computed for every stage of `train.pseudo_labels`: all that the teacher
predicts (from class score 0.3 on, or from the filter's lowest), what the filter keeps,
the same with masks redrawn by SAM, with classes corrected, and with class shares
aligned. So each part shows what it does and what it costs.

A pseudo-label and an instance are matched one to one, in the order of the teacher's
score, as COCO does, but regardless of the class: the class is what is being audited.
A pseudo-label on a crowd lies on no instance.

Read next: `ssis/report/pictures.py`, which draws the same stages.
"""

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from ssis import distributed
from ssis.targets import mask_iou, match
from ssis.teacher import PseudoLabels

# Below FEW times the labeled density a teacher has collapsed, above MANY times it
# explodes; a class is judged if ENOUGH instances of it were expected. The watch reports
# every so many steps.
FEW, MANY, ENOUGH = 0.05, 5.0, 20
WATCH_EVERY = 100
# The flags that make a filter stricter or looser.
FLAGS = dict(
    score="--tau-class",
    coupled="--tau-class",
    dual="--tau-class or --tau-mask",
    adaptive="--tau-min and --tau-max, or --tau-mask-min and --tau-mask-max",
    calibrated="the thresholds by hand (--filter dual)",
)
FLAGS["three-way"] = FLAGS["adaptive"]
# Lowest class score of the stage `predicted`, before any filter.
PREDICTED = 0.3
# The columns of the sums from which all numbers follow. Sums, not means, since those of
# several processes are added up.
KEPT, MATCHED, RIGHT, IOU, TRUE, FOUND = range(6)


def tally(pseudo: PseudoLabels, target: dict, classes: int) -> Tensor:
    """The sums of one image.

    Args:
        pseudo: what was kept, best first.
        target: the ground truth in the same frame: boxes, labels, masks.
        classes: C.

    Returns:
        (C + 1, 6) float64; columns KEPT .. FOUND. Row = the predicted class for the
        first four, the true class for TRUE and FOUND.
    """
    sums = torch.zeros(classes + 1, 6, dtype=torch.float64)
    labels, true_labels = pseudo.labels.cpu(), target["labels"].cpu()
    partner = match(pseudo.boxes, target["boxes"])
    hit = partner >= 0
    true_masks = target["masks"].cpu().bool()[partner[hit]]
    overlap = mask_iou(pseudo.masks[hit].cpu(), true_masks)
    for label in labels:
        sums[label, KEPT] += 1
    for label, true, iou in zip(
        labels[hit], true_labels[partner[hit]], overlap, strict=True
    ):
        sums[label, MATCHED] += 1
        sums[label, RIGHT] += label == true
        sums[label, IOU] += iou
        sums[true, FOUND] += 1
    for label in true_labels:
        sums[label, TRUE] += 1
    return sums


def summary(sums: Tensor, images: int, labeled_per_image: float) -> dict:
    """The five numbers of some sums (any number of rows of `tally`)."""
    kept, matched, right, iou, true, found = sums.reshape(-1, 6).sum(0).tolist()

    def ratio(part: float, whole: float) -> float | None:
        return round(part / whole, 4) if whole else None

    return dict(
        pseudo_per_image=ratio(kept, images),
        labeled_per_image=round(labeled_per_image, 4),
        box_precision=ratio(matched, kept),
        class_accuracy=ratio(right, matched),
        mask_iou=ratio(iou, matched),
        recall=ratio(found, true),
    )


def per_class(sums: Tensor, images: int, names: list[str]) -> dict:
    """`summary` of every class; there `labeled_per_image` is from the ground truth."""
    return {
        name: summary(row, images, row[TRUE].item() / max(images, 1))
        for name, row in zip(names, sums[1:], strict=True)
    }


def apply_oracle(pseudo: PseudoLabels, target: dict, what: str) -> PseudoLabels:
    """Replace classes or masks by the ground truth, to see how much they could gain.

    A pseudo-label that lies on no instance stays as it is.

    Args:
        pseudo: of one image.
        target: the ground truth in the same frame.
        what: "class", "mask" (with the box) or "both".

    Raises:
        ValueError: another `what`.
    """
    if what not in ("class", "mask", "both"):
        raise ValueError(f"unknown oracle {what!r}")
    partner = match(pseudo.boxes, target["boxes"]).to(pseudo.boxes.device)
    hit = partner >= 0
    true = {key: t.to(partner.device)[partner[hit]] for key, t in target.items()}
    result = dataclasses.replace(pseudo)
    if what in ("class", "both"):
        result.labels = pseudo.labels.clone()
        result.labels[hit] = true["labels"]
    if what in ("mask", "both"):
        result.boxes, result.masks = pseudo.boxes.clone(), pseudo.masks.clone()
        result.mask_probs = pseudo.mask_probs.clone()
        # A mask that is true is beyond doubt, whatever SAM and the teacher agreed on.
        result.mask_quality = pseudo.mask_quality.clone()
        result.boxes[hit], result.masks[hit] = true["boxes"], true["masks"].bool()
        result.mask_probs[hit] = true["masks"].float()
        result.mask_quality[hit] = 1.0
    return result


def measure(
    pairs: Iterable, names: list[str], labeled_per_image: float, count: int, device
) -> dict:
    """Audit the pseudo-labels of some unlabeled images, over all processes.

    Every process must call this.

    Args:
        pairs: (item, stages) of this process's images, one after the other: an item of
            a `data.Stream` with its hidden `target`, and stage -> [`PseudoLabels`] of
            that image. May be a generator: one image at a time is in memory.
        names: of the C classes.
        labeled_per_image: instances on a labeled image.
        count: images of all processes together; 0: there is no ground truth.
        device: where processes exchange tensors.

    Returns:
        {"audit": the numbers of what the student is trained on, "audit_per_class":
        {name: numbers}, "audit_stages": {stage: numbers}}; None without ground truth.
    """
    if not count:
        return dict(audit=None, audit_per_class=None, audit_stages=None)
    sums: dict[str, Tensor] = {}
    for item, stages in pairs:
        for stage, pseudo in stages.items():
            of_image = tally(pseudo[0], item["target"], len(names))
            sums[stage] = sums.get(stage, 0) + of_image
    # A process without an image knows no stages; the first one always has one.
    stages = distributed.gather(list(sums))[0]
    zeros = torch.zeros(len(names) + 1, 6, dtype=torch.float64)
    total = torch.stack([sums.get(stage, zeros) for stage in stages])
    total = distributed.all_sum(total.float().to(device)).double().cpu()
    numbers = {
        stage: summary(table, count, labeled_per_image)
        for stage, table in zip(stages, total, strict=True)
    }
    return dict(
        audit=numbers["final"],
        audit_per_class=per_class(total[-1], count, names),
        audit_stages=numbers,
    )


class Watch:
    """Compares the kept pseudo-labels with the labeled density, in all and by class.

    The labeled images say how many instances of each class an image should have. This
    needs no ground truth of the unlabeled ones, so it works on every dataset.

    Args:
        names: of the C classes.
        rule: of the filter; the advice names its flags.
        per_image: instances on a labeled image.
        class_shares: (C,) fractions of the classes among them.
    """

    def __init__(
        self, names: list[str], rule: str, per_image: float, class_shares: Tensor
    ):
        self.names = names
        self.per_image, self.expected = per_image, per_image * class_shares
        if rule not in FLAGS:
            raise ValueError(f"unknown filter {rule!r}")
        self.flags = FLAGS[rule]
        # Since the last report: images, then kept pseudo-labels of each class.
        self.sums = torch.zeros(len(names) + 1)

    def add(self, kept: list[Tensor]) -> None:
        """Count the kept pseudo-labels of B images by their labels (N,)."""
        for labels in kept:
            # There is no label 0, so its column counts the images.
            counts = F.one_hot(labels, len(self.sums)).sum(dim=0).float()
            counts[0] = 1
            self.sums = self.sums.to(counts.device) + counts

    def report(self, write) -> None:
        """Write a warning when the teacher keeps next to nothing, or far too much.

        Every process must call this; counting then starts anew.

        Args:
            write: a function that prints a line; the progress bar's, on the first
                process alone.
        """
        sums = distributed.all_sum(self.sums).cpu()
        self.sums = torch.zeros_like(self.sums)
        images, kept = sums[0].item(), sums[1:]
        if not images:
            return
        per_image, usual = kept.sum().item() / images, self.per_image
        numbers = (
            f"{per_image:.2f} pseudo-labels per image, {usual:.2f} instances per "
            "labeled image"
        )
        if per_image < FEW * usual:
            write(
                f"warning: the teacher has collapsed: {numbers}; lower {self.flags}, "
                "or pretrain longer"
            )
            return
        if per_image > MANY * usual:
            write(
                f"warning: the teacher explodes: {numbers}; raise {self.flags}, or "
                "lower --unsup-weight"
            )
            return
        # The same for each class: a frequent one may hide that a rare one is lost.
        expected = self.expected * images
        judged = expected >= ENOUGH
        for wrong, what, mend in (
            (kept < FEW * expected, "next to none", "lower"),
            (kept > MANY * expected, "far too many", "raise"),
        ):
            rows = (wrong & judged).nonzero().flatten().tolist()
            if rows:
                classes = ", ".join(
                    f"{self.names[k]} ({kept[k]:.0f}, {expected[k]:.0f} expected)"
                    for k in rows[:5]
                )
                more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
                write(
                    f"warning: {what} of the pseudo-labels are of class "
                    f"{classes}{more}; {mend} {self.flags}, or label more of them"
                )
