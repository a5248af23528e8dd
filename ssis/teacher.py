r"""The EMA teacher and the pseudo-labels it predicts.

The teacher is a second copy of the student that is never trained by gradients. In
mutual learning its weights follow the student's as an exponential moving average

$$\theta_t \leftarrow \alpha \theta_t + (1 - \alpha) \theta_s$$       GD Eq. (EMA)

over parameters *and* float buffers (running statistics that lag behind their weights
would make another network). An average over many steps is smoother and mostly better
than any single student, which is why it may judge the student's unlabelled images.

Guided Distillation's order: the teacher is first trained on the labelled images, then
*frozen* while the student learns from it (guided burn-in), then set to a copy of the
student, and averaged from there on.

`predict` is torchvision's inference, step by step, because the methods need what
torchvision throws away: the whole class distribution, and soft masks with a quality.
A test holds it against torchvision's own.

Read next: `ssis/filters.py`, which decides what of the predictions is kept.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import (
    maskrcnn_inference,
    paste_masks_in_image,
)
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from ssis.model import MaskRCNN


def make_teacher(student: nn.Module, decay: float) -> AveragedModel:
    """A frozen copy of the student; `update_parameters(student)` is one EMA step.

    The first update copies and later ones average: PyTorch counts in `n_averaged`.
    So `restart(teacher)` before mutual learning is GD's "teacher := student".
    """
    teacher = AveragedModel(
        student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True
    )
    # Evaluation mode for good: the teacher predicts, and collects no statistics.
    return teacher.eval().requires_grad_(False)


def restart(teacher: AveragedModel) -> None:
    """Make the next update a copy of the student."""
    teacher.n_averaged.zero_()


@dataclass
class PseudoLabels:
    """Predicted instances of one image, best first; each stage takes and returns one.

    Attributes:
        boxes: (N, 4) float32, xyxy, pixels of the image given to `predict`.
        labels: (N,) int64, 1..C.
        class_quality: (N,) float32 in [0, 1], probability of the label.
        mask_quality: (N,) float32 in [0, 1], mean mask probability over the mask.
        mask_probs: (N, H, W) float32 in [0, 1], 0 outside the box.
        masks: (N, H, W) bool, `mask_probs > 0.5`.
        distribution: (N, C) float32, probabilities of the C classes; what is missing to
            a sum of 1 is the probability of background.
    """

    boxes: Tensor
    labels: Tensor
    class_quality: Tensor
    mask_quality: Tensor
    mask_probs: Tensor
    masks: Tensor
    distribution: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, keep: Tensor) -> "PseudoLabels":
        """The instances that a bool mask or an index tensor selects."""
        fields = dataclasses.fields(self)
        return PseudoLabels(*(getattr(self, field.name)[keep] for field in fields))

    def target(self) -> dict:
        """As a training target: torchvision's dict."""
        return dict(
            boxes=self.boxes, labels=self.labels, masks=self.masks.to(torch.uint8)
        )


def mask_quality(mask_probs: Tensor) -> Tensor:
    """PL-DC Eq. (mask quality): m = mean of p over the predicted foreground {p > 0.5}.

    Args:
        mask_probs: (N, H, W) in [0, 1].

    Returns:
        (N,) in (0.5, 1], or 0 where the foreground is empty.
    """
    foreground = mask_probs > 0.5
    area = foreground.flatten(1).sum(dim=1)
    return (mask_probs * foreground).flatten(1).sum(dim=1) / area.clamp(min=1)


@torch.no_grad()
def predict(
    model: MaskRCNN, images: list[Tensor], min_score: float
) -> list[PseudoLabels]:
    """What a model sees in some images, in their own frame (nothing is resized).

    Args:
        model: in evaluation mode.
        images: (3, H, W) float in [0, 1] each, of any sizes.
        min_score: class probability under which a detection is not looked at. High
            values save memory: a soft mask is H x W floats for each instance.

    Returns:
        One `PseudoLabels` for each image; N may be 0.
    """
    roi = model.roi_heads
    sizes = [tuple(image.shape[-2:]) for image in images]
    batch = model.transform.batch_images([model.transform.normalize(x) for x in images])
    features = model.backbone(batch)
    proposals, _ = model.rpn(ImageList(batch, sizes), features)
    # First stage: classify and regress every proposal.
    box_features = roi.box_head(roi.box_roi_pool(features, proposals, sizes))
    logits, regression = roi.box_predictor(box_features)
    # float32: box arithmetic and NMS lose whole pixels in 16 bits.
    probs = logits.float().softmax(dim=-1)  # (proposals of all images, C + 1)
    boxes = roi.box_coder.decode(regression.float(), proposals)  # (.., C + 1, 4)
    counts = [len(p) for p in proposals]
    detections = [
        detect(b, p, size, min_score, roi.nms_thresh, roi.detections_per_img)
        for b, p, size in zip(
            boxes.split(counts), probs.split(counts), sizes, strict=True
        )
    ]
    # Second stage: a mask for each box that is left, that of its class.
    kept_boxes = [d[0] for d in detections]
    mask_features = roi.mask_head(roi.mask_roi_pool(features, kept_boxes, sizes))
    mask_logits = roi.mask_predictor(mask_features).float()
    small_masks = maskrcnn_inference(mask_logits, [d[1] for d in detections])
    result = []
    for (box, label, score, distribution), small, size in zip(
        detections, small_masks, sizes, strict=True
    ):
        soft = paste_masks_in_image(small, box, size)[:, 0]  # (N, H, W)
        result.append(
            PseudoLabels(
                box, label, score, mask_quality(soft), soft, soft > 0.5, distribution
            )
        )
    return result


def detect(
    boxes: Tensor,
    probs: Tensor,
    size: tuple[int, int],
    min_score: float,
    nms_iou: float,
    limit: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Proposals of one image into detections: torchvision's rules, keeping the classes.

    Args:
        boxes: (P, C + 1, 4) one box per proposal and class.
        probs: (P, C + 1) softmax, column 0 is background.
        size: height and width to clip to.
        min_score, nms_iou, limit: of torchvision's `postprocess_detections`.

    Returns:
        boxes (N, 4), labels (N,), scores (N,), distributions (N, C), best first.
    """
    boxes = clip_boxes_to_image(boxes, size)
    # Each (proposal, class) above the threshold is a candidate of its own. To threshold
    # before NMS changes nothing: a box is only ever suppressed by a better one.
    row, column = torch.where(probs[:, 1:] > min_score)
    candidates, scores = boxes[row, column + 1], probs[row, column + 1]
    # A degenerate box would make the student's loss raise.
    big = remove_small_boxes(candidates, min_size=1e-2)
    row, column, candidates, scores = (
        row[big],
        column[big],
        candidates[big],
        scores[big],
    )
    keep = batched_nms(candidates, scores, column, nms_iou)[:limit]
    return candidates[keep], column[keep] + 1, scores[keep], probs[row[keep], 1:]
