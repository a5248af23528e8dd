r"""How good are the pseudo-labels, when the truth is known.

The final AP says whether a method worked; the audit says why. On some unlabelled images
whose annotations were hidden from training, the teacher's kept pseudo-labels are
compared with the truth:

    pseudo_per_image    kept instances, against labeled_per_image, the density to expect
    box_precision       share of them that lie on an instance (box IoU >= 0.5)
    class_accuracy      share of those that have its class
    mask_iou            mean mask IoU of those with it
    recall              share of the instances that some pseudo-label lies on

Shares are in [0, 1]; one that is a share of nothing is None.

A pseudo-label and an instance are matched one to one, best class quality first, as
COCO does, but regardless of the class: the class is what is being audited.

Read next: `ssis/visualize.py`, the same in pictures.
"""

import torch
from torch import Tensor
from torchvision.ops import box_iou

from ssis import distributed, filters, teacher
from ssis.teacher import PseudoLabels

MATCH_IOU = 0.5
# The sums that everything follows from; one row for each label, so that the rows of
# several processes can be added up.
KEPT, MATCHED, RIGHT, IOU, TRUE, FOUND = range(6)


def match(boxes: Tensor, truth: Tensor) -> Tensor:
    """One-to-one matching by box IoU, in the order of `boxes`.

    Args:
        boxes: (N, 4), best first.
        truth: (M, 4).

    Returns:
        (N,) int64: index of the matched truth, -1 for none.
    """
    result = torch.full((len(boxes),), -1)
    if len(boxes) == 0 or len(truth) == 0:
        return result
    iou = box_iou(boxes.cpu(), truth.cpu())  # (N, M)
    for i in range(len(boxes)):
        best = iou[i].argmax()
        if iou[i, best] >= MATCH_IOU:
            result[i] = best
            # Taken: a second box on the same instance is a duplicate, hence wrong.
            iou[:, best] = -1
    return result


def tally(pseudo: PseudoLabels, target: dict, classes: int) -> Tensor:
    """The sums of one image.

    Args:
        pseudo: what was kept, best first.
        target: the truth in the same frame: boxes, labels, masks.
        classes: C.

    Returns:
        (C + 1, 6) float64; columns KEPT .. FOUND. Row = the predicted class for the
        first four, the true class for TRUE and FOUND.
    """
    sums = torch.zeros(classes + 1, 6, dtype=torch.float64)
    labels, true_labels = pseudo.labels.cpu(), target["labels"].cpu()
    partner = match(pseudo.boxes, target["boxes"])
    hit = partner >= 0
    mask, true_mask = (
        pseudo.masks[hit].cpu(),
        target["masks"].cpu().bool()[partner[hit]],
    )
    overlap = (mask & true_mask).flatten(1).sum(1) / (mask | true_mask).flatten(1).sum(
        1
    )
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

    def share(part: float, whole: float) -> float | None:
        return round(part / whole, 4) if whole else None

    return dict(
        pseudo_per_image=share(kept, images),
        labeled_per_image=round(labeled_per_image, 4),
        box_precision=share(matched, kept),
        class_accuracy=share(right, matched),
        mask_iou=share(iou, matched),
        recall=share(found, true),
    )


def per_class(sums: Tensor, images: int, names: list[str]) -> dict:
    """`summary` for every class; `labeled_per_image` is that of the truth."""
    return {
        name: summary(row, images, row[TRUE].item() / max(images, 1))
        for name, row in zip(names, sums[1:], strict=True)
    }


def run(run, stream, labeled_per_image: float) -> dict:
    """Audit a run's teacher on some unlabelled images, over all processes.

    The images are weak views, as the student's are.

    Args:
        run: `train.Run`.
        stream: unlabelled images with their hidden targets; None without truth.
        labeled_per_image: instances per labelled image.

    Returns:
        {"audit": the numbers, "audit_per_class": {name: numbers}}, None without truth.
    """
    if stream is None:
        return dict(audit=None, audit_per_class=None)
    names, config = stream.dataset.names, run.config
    count = min(config.audit_images, len(stream.indices))
    sums = torch.zeros(len(names) + 1, 6, device=run.device)
    for k in range(run.rank, count, run.world):
        item = stream[k]
        weak = [item["image"].to(run.device)]
        found = teacher.predict(run.teacher.module, weak, config.tau_class)[0]
        kept = filters.keep(found, config.tau_class, config.min_area)
        sums += tally(kept, item["target"], len(names)).to(sums)
    sums = distributed.all_sum(sums).cpu()
    return dict(
        audit=summary(sums, count, labeled_per_image),
        audit_per_class=per_class(sums, count, names),
    )


def warn(means: dict, labeled_per_image: float, write) -> None:
    """Write a line when the teacher keeps next to nothing, or far too much.

    The labelled images say how many instances there should be. This needs no truth of
    the unlabelled ones, so it works on every dataset.

    Args:
        means: of `losses.means`; `pseudo_per_image` is used.
        labeled_per_image: instances per labelled image.
        write: a function that prints a line.
    """
    found = means["pseudo_per_image"]
    if found < 0.05 * labeled_per_image:
        write(
            f"warning: the teacher has collapsed: {found:.2f} pseudo-labels per image, "
            f"{labeled_per_image:.2f} instances per labelled image; lower "
            "--tau-class, or pretrain longer"
        )
    if found > 5 * labeled_per_image:
        write(
            f"warning: the teacher explodes: {found:.2f} pseudo-labels per image, "
            f"{labeled_per_image:.2f} instances per labelled image; raise "
            "--tau-class, or lower --unsup-weight"
        )
