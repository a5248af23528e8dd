r"""The EMA teacher and the pseudo-labels it predicts.

The teacher is a second network like the student, but is never trained by gradients. In
mutual learning its weights follow the student's as an exponential moving average

$$\theta_t \leftarrow \alpha \theta_t + (1 - \alpha) \theta_s$$       GD Eq. (EMA)

over parameters *and* float buffers, since running statistics belong to the weights that
they were collected with. An average over many steps is smoother and mostly better than
any single student. That is why it labels the student's unlabeled images.

Why not let the student label them itself? It would confirm its latest mistakes, and
each step would make it more confident of them. The average changes slowly (with
$\alpha$ = 0.9996 it is over some 2,500 steps), so a mistake has to persist before it is
taught; and the teacher sees the weak view, on which fewer mistakes are made.

Guided Distillation's order: the teacher is first trained on the labeled images, then
*frozen* while the student learns from it (guided burn-in), then set to a copy of the
student, and averaged from there on.

What it predicts in an image is one `PseudoLabels`: instances with their class
distribution, a soft mask, and a quality of each. Filter, SAM, category correction and
alignment take one and return one.

The EMA update is float32, also with `--amp`, like all weights: adding 0.0004 of a
difference would change nothing in 16 bits.

Chain: 9 of 24. Read next: `ssis/filters.py`, which decides what is kept.
"""

import copy
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ssis import losses
from ssis.inference import detect, paste
from ssis.model import MaskRCNN


def make_teacher(student: nn.Module) -> nn.Module:
    """A frozen copy of the student.

    Args:
        student: the network; the copy gets its weights and stays on its device.
    """
    # Evaluation mode for good: the teacher predicts, and collects no statistics of its
    # own. No gradients: it changes by copies and averages of the student alone.
    return copy.deepcopy(student).eval().requires_grad_(False)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, alpha: float) -> None:
    """GD Eq. (EMA): one step of the moving average, in place.

    Args:
        teacher: of the same architecture as the student.
        student: not changed.
        alpha: from 0 (the teacher becomes the student) to 1 (it never changes).
    """
    # The state dict holds parameters and buffers. BatchNorm's running statistics are
    # averaged like the weights, since they describe the activations of these weights.
    pairs = zip(
        teacher.state_dict(keep_vars=True).values(),
        student.state_dict(keep_vars=True).values(),
        strict=True,
    )
    theta_t, theta_s = [], []
    for ours, theirs in pairs:
        if ours.is_floating_point():
            theta_t.append(ours)
            theta_s.append(theirs)
        else:
            # BatchNorm's count of the batches that it saw: an average of two counts
            # would be no count of anything.
            ours.copy_(theirs)
    # PyTorch's own average, theta_t + (1 - alpha) (theta_s - theta_t), of all tensors
    # in one call: there are hundreds, and a GPU would be sent each of them alone.
    get_ema_multi_avg_fn(alpha)(theta_t, theta_s, None)


@dataclass
class PseudoLabels:
    """Predicted instances of one image, by the teacher's score, best first.

    Each stage takes one and returns one, and keeps the order.

    Attributes:
        boxes: (N, 4) float32, xyxy, pixels of the image given to `predict`.
        labels: (N,) int64, 1..C.
        class_quality: (N,) float32 in [0, 1], probability of the label.
        mask_quality: (N,) float32 in [0, 1], mean mask probability over the mask.
        mask_probs: (N, H, W) float32 in [0, 1]; the teacher's, 0 outside the box, or
            SAM's after `refine`.
        masks: (N, H, W) bool, `mask_probs > 0.5`.
        distribution: (N, C) float32, probabilities of the C classes. What is missing to
            a sum of 1 is the probability of background, until the category classifier's
            distribution is mixed in (`correction.fuse`), which has no background. The
            alignment (`ssis/alignment.py`) changes label and class quality alone.
        features: (N, D, 7, 7) float32, the network's feature map in each predicted box.
        mask_logits: (N, 1, 28, 28) float32, the mask head's output in this box; where
            a logit passes 17, its probability is rounded to 1.
        feature_boxes: (N, 4) these boxes; `boxes` may be SAM's after `refine`.
    """

    boxes: Tensor
    labels: Tensor
    class_quality: Tensor
    mask_quality: Tensor
    mask_probs: Tensor
    masks: Tensor
    distribution: Tensor
    features: Tensor
    mask_logits: Tensor
    feature_boxes: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, keep: Tensor | slice) -> "PseudoLabels":
        """The instances that a bool mask, an index tensor or a slice selects."""
        if isinstance(keep, Tensor) and keep.dtype == torch.bool:
            # Once, not for each field: a GPU has to be waited for to know how many.
            keep = keep.nonzero()[:, 0]
        fields = dataclasses.fields(self)
        return PseudoLabels(*(getattr(self, field.name)[keep] for field in fields))

    def target(self, uncertainty: bool = False, calibrated: bool = False) -> dict:
        """As a training target: torchvision's dict.

        Args:
            uncertainty: with `mask_weights` (N, H, W): 1 - u, PL-DC Eq. (uncertainty).
            calibrated: these (or ones) times the mask quality, ssis Eq. (calibration).
        """
        target = dict(
            boxes=self.boxes, labels=self.labels, masks=self.masks.to(torch.uint8)
        )
        if uncertainty or calibrated:
            weights = torch.ones_like(self.mask_probs)
            if uncertainty:
                weights = losses.certainty(self.mask_probs)
            if calibrated:
                weights = weights * self.mask_quality[:, None, None]
            target["mask_weights"] = weights
        return target


def mask_quality(mask_probs: Tensor) -> Tensor:
    """PL-DC Eq. (quality): m, the mean of p over the predicted foreground {p > 0.5}.

    Args:
        mask_probs: (N, H, W) in [0, 1].

    Returns:
        (N,) in (0.5, 1], or 0 where the foreground is empty.
    """
    # Only the foreground counts: outside, p is near 0 for every mask, good or bad. A
    # confident mask has m near 1, one that is unsure everywhere m just above one half.
    # Times the bool mask, the background adds nothing to the sum.
    foreground = mask_probs > 0.5
    area = foreground.flatten(1).sum(dim=1)
    return (mask_probs * foreground).flatten(1).sum(dim=1) / area.clamp(min=1)


def predict(
    model: MaskRCNN, images: list[Tensor], min_score: float
) -> list[PseudoLabels]:
    """A model's predictions in some images, in the frame of each.

    Args:
        model: in evaluation mode.
        images: (3, H, W) float in [0, 1] each, of any sizes.
        min_score: class probability below which a detection is dropped. High values
            save memory: a soft mask is H x W floats for each instance.

    Returns:
        One `PseudoLabels` for each image; N may be 0.
    """
    result = []
    detections = detect(model, images, min_score)
    for image, detected in zip(images, detections, strict=True):
        boxes, labels, scores, distributions, features, logits, small = detected
        # Two masks: the hard one is the student's target; the soft one gives the mask
        # quality, SAM's points and the uncertainty of each pixel.
        soft = paste(small, boxes, tuple(image.shape[-2:]))  # (N, H, W)
        hard, quality = soft > 0.5, mask_quality(soft)
        parts = (boxes, labels, scores, quality, soft, hard, distributions, features)
        # The boxes twice: at the end those that features and logits belong to.
        result.append(PseudoLabels(*parts, logits, boxes))
    return result
