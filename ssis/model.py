r"""Mask R-CNN: torchvision's, with the few things the papers need added.

Both papers build on a query-based segmenter (Mask2Former). This project uses
torchvision's Mask R-CNN, which everyone has, and which gives the methods the same three
things: a class distribution, a soft mask, and a stride-4 feature map. What this changes
is listed in `docs/differences.md`.

What is added to torchvision's model:

* no resizing in training: the views (`ssis/augment.py`) are resized already, and
  pseudo-labels must stay in the frame that they were predicted in;
* anchors and box arithmetic in float32, also under mixed precision: coordinates of
  hundreds of pixels need more than the 8 significant bits of bf16;
* the strides of the RoI pooling, stated instead of guessed;
* a mask loss that takes a weight for each pixel (PL-DC);
* a weight of background in both classification losses (all three papers);
* counts: how many anchors, proposals and foreground proposals, or how much weight, each
  loss was averaged over. With them the losses of N processes can be averaged as those
  of one process would be; the mean of N means is something else (`ssis/losses.py`);
* the stride-4 feature map as an output in training, for S4M's distillation.

What happens to an image in training, and where the five losses come from:

    backbone, FPN     the image as maps of stride 4, 8, 16 (and 32), D channels each
    RPN               some anchors at every location: is there an object
                      (loss_objectness), and how must the anchor move
                      (loss_rpn_box_reg)? The best ones become the proposals
    RoI pooling       the maps in each proposal's box, as 7 x 7 cells
    box head          which class, or background (loss_classifier), and how must the
                      proposal move (loss_box_reg)?
    mask head         foreground proposals only: 14 x 14 cells into 28 x 28 pixels for
                      each class (loss_mask)

Nearly all anchors and proposals are background, and a network trained on all of them
would learn nothing else. So both stages train on a random sample of foreground and
background.

*Mixed precision.* With `--amp` the forward pass of a training step, losses included,
runs under autocast (`train.py`), which computes convolutions and matrix products in 16
bits, and what needs more, such as softmax and cross-entropy, in float32. Outside of it
are the backward pass (each gradient has the type of its forward operation), the sum of
the losses, S4M's distillation loss, and the optimizer. The weights are always float32:
a step of 1e-4 on a weight of 1 would be rounded away in 16 bits.

Chain: 6 of 24. Read next: `ssis/networks.py`, in which sizes it is built.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import mask_rcnn
from torchvision.models.detection._utils import (
    BalancedPositiveNegativeSampler,
    BoxCoder,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    project_masks_on_boxes,
)
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from ssis import losses


def autocast(config, device: torch.device) -> torch.autocast:
    """Mixed precision, where `--amp` asks for it."""
    dtype = torch.float16 if config.amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=config.amp != "off")


class CountingSampler(BalancedPositiveNegativeSampler):
    """torchvision's sampler of foreground and background, which counts what it draws.

    After a call, `positive` and `drawn` are bool masks over the anchors (or proposals)
    of all images together: which were drawn as foreground, and which at all. The losses
    of this stage are means over these.
    """

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        # For each image two masks over its anchors (or proposals): which are trained as
        # foreground, and which as background. The rest is not trained in this step.
        positive, negative = super().__call__(matched_idxs)
        self.positive = torch.cat(positive).bool()
        self.drawn = self.positive | torch.cat(negative).bool()
        return positive, negative


class BoxCoder32(BoxCoder):
    """torchvision's box arithmetic, in float32 also under mixed precision.

    In bf16 a coordinate beyond 256 is a multiple of 2, beyond 1024 of 8: small boxes
    lose their width, and their regression target becomes infinite.
    """

    # The network's own output is relative to the box (shifts in widths, logarithms of
    # scales) and small, so 16 bits are enough for it. Pixel coordinates are not small.
    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        return super().decode_single(rel_codes.float(), boxes.float())


class Anchors32(AnchorGenerator):
    """torchvision's anchors, in float32 also under mixed precision.

    torchvision's have the type of the feature maps. In bf16 two thirds of the anchors
    of an image of 800 x 1333 pixels are wrong, by up to 7 pixels, and evaluation,
    without autocast, would have others than training.
    """

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.float32, device)


class FrozenNorm(FrozenBatchNorm2d):
    """torchvision's constant BatchNorm, in the type of its input.

    torchvision multiplies by float32 constants: under mixed precision what comes out is
    float32, twice the memory, for every activation of the backbone.
    """

    def forward(self, x: Tensor) -> Tensor:
        state = (self.running_mean, self.running_var, self.weight, self.bias)
        return F.batch_norm(x, *state, training=False, eps=self.eps)


def fix_scales(pool: MultiScaleRoIAlign) -> None:
    """Tell an RoI pooling the strides of its levels: 4, 8, 16, ...

    By default torchvision guesses them from the first batch that it sees, and does not
    save the guess in the state dict. With small images, in which the padding is a large
    part, it guesses wrong, and a resumed model may guess something else.
    """
    levels = len(pool.featmap_names)
    pool.scales = [0.25 / 2**k for k in range(levels)]
    # Which level a box is pooled from depends on its size, by FPN's rule: a box of 224
    # pixels from stride 16, one of half the size from stride 8. 2^2 is the stride of
    # the first level.
    pool.map_levels = initLevelMapper(
        2, levels + 1, pool.canonical_scale, pool.canonical_level
    )


class WeightedRPN(RegionProposalNetwork):
    """torchvision's first stage, with a weight of background in its objectness loss.

    Attributes:
        no_object: w_0 of GD Eq. (no object), set by `MaskRCNN.forward`.
        weight: the sum of the weights of the anchors drawn last, a scalar.
    """

    no_object = 1.0

    def compute_loss(self, objectness, pred_bbox_deltas, labels, regression_targets):
        """Two scalars, as torchvision's; its arguments."""
        # torchvision draws the anchors here. Its box loss is used, its objectness loss,
        # in which all anchors count the same, is not.
        _, loss_box = super().compute_loss(
            objectness, pred_bbox_deltas, labels, regression_targets
        )
        drawn = self.fg_bg_sampler.drawn.nonzero()[:, 0]
        labels = torch.cat(labels)[drawn]
        # Is there an object? Cross-entropy with two outcomes for each drawn anchor.
        each = F.binary_cross_entropy_with_logits(
            objectness.flatten()[drawn], labels, reduction="none"
        )
        loss, self.weight = losses.weighted_mean(each, labels, self.no_object)
        return loss, loss_box


class WeightedRoIHeads(RoIHeads):
    """torchvision's second stage, with weights in two of its losses.

    A target may have `mask_weights` (N, H, W) float in [0, 1] beside its `masks`: a
    weight for each pixel of the mask loss. In evaluation mode it is torchvision's,
    unchanged.

    Attributes:
        no_object: w_0 of GD Eq. (no object), set by `MaskRCNN.forward`.
        weight: the sum of the weights of the proposals drawn last, a scalar.
    """

    no_object = 1.0

    def forward(self, features, proposals, image_shapes, targets=None):
        """Losses of the second stage, in torchvision's form.

        Args:
            features: the FPN's levels, name -> (B, D, H / s, W / s).
            proposals: (R, 4) of each image, pixels.
            image_shapes: height and width of each image before padding.
            targets: of each image; None in evaluation.

        Returns:
            [] in place of detections, and a dict of three scalars.
        """
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        # As in torchvision: match proposals with instances (an IoU of at least one
        # half, else background) and sample some of both kinds. `matched` is the index
        # of the instance; for background it is 0 and means nothing.
        proposals, matched, labels, regression = self.select_training_samples(
            proposals, targets
        )
        # Classify the sampled proposals, and regress their boxes.
        box_features = self.box_head(
            self.box_roi_pool(features, proposals, image_shapes)
        )
        # Classes by cross-entropy over all samples; boxes by smooth L1 over the
        # foreground, but divided by the number of all samples, as Fast R-CNN does.
        logits, deltas = self.box_predictor(box_features)
        _, loss_box_reg = fastrcnn_loss(logits, deltas, labels, regression)
        # torchvision's loss of the classes, but with a weight of background.
        classes = torch.cat(labels)
        each = F.cross_entropy(logits, classes, reduction="none")
        loss_classifier, self.weight = losses.weighted_mean(
            each, classes, self.no_object
        )
        # Masks are learned on foreground proposals alone, since background has no mask.
        # The head predicts a mask for each class, so that classes do not compete for
        # pixels; only that of the target's class is trained.
        foreground = [torch.where(label > 0)[0] for label in labels]
        boxes = [p[keep] for p, keep in zip(proposals, foreground, strict=True)]
        mask_features = self.mask_head(
            self.mask_roi_pool(features, boxes, image_shapes)
        )
        mask_logits = self.mask_predictor(mask_features)

        # The targets of the mask loss, image by image.
        side, aligned, weights, own = mask_logits.shape[-1], [], [], []
        for target, box, match, keep in zip(
            targets, boxes, matched, foreground, strict=True
        ):
            # Each proposal learns the mask of the instance that it was matched with, as
            # far as it lies in the proposal's own box: (P, 28, 28).
            instance = match[keep]
            aligned.append(project_masks_on_boxes(target["masks"], box, instance, side))
            # PL-DC's weights go through the same RoIAlign as the mask, so each pixel
            # keeps its weight. Targets without weights are labeled ones, in which every
            # pixel is known. A batch has either all labeled or all unlabeled images.
            if "mask_weights" in target:
                weights.append(
                    project_masks_on_boxes(target["mask_weights"], box, instance, side)
                )
            own.append(target["labels"][instance])
        # PL-DC Eq. (PMUA), or the plain mean without weights.
        loss_mask = losses.mask_loss(
            mask_logits,
            torch.cat(own),
            torch.cat(aligned),
            torch.cat(weights) if weights else None,
        )
        return [], dict(
            loss_classifier=loss_classifier,
            loss_box_reg=loss_box_reg,
            loss_mask=loss_mask,
        )


class MaskRCNN(mask_rcnn.MaskRCNN):
    """torchvision's Mask R-CNN, which in training returns counts and features too.

    In evaluation mode it is torchvision's model, unchanged. In training mode, called
    with images, a list of (3, H, W) float tensors in [0, 1] of any sizes, their
    targets, and the weight of background (w_0 of GD Eq. (no object)), it returns

    * losses: torchvision's dict of five scalars;
    * counts: (5,) float, what these are means over (`losses.COUNT_OF`);
    * features: (B, D, H / 4, W / 4), the FPN's stride-4 level of the padded batch.
    """

    def __init__(self, backbone: nn.Module, num_classes: int | None = None, **settings):
        # `_skip_resize`: torchvision's own switch for images resized beforehand. They
        # are still normalized, and padded to one size, a multiple of 32.
        super().__init__(backbone, num_classes, _skip_resize=True, **settings)
        # The same objects with other losses. torchvision has no argument for stages of
        # one's own, and new ones would repeat all of their settings.
        self.rpn.__class__ = WeightedRPN
        self.roi_heads.__class__ = WeightedRoIHeads
        # Both stages sample and decode boxes, so both get the two small changes.
        for part in (self.rpn, self.roi_heads):
            old = part.fg_bg_sampler
            part.fg_bg_sampler = CountingSampler(
                old.batch_size_per_image, old.positive_fraction
            )
            part.box_coder = BoxCoder32(part.box_coder.weights)
        self.rpn.anchor_generator.__class__ = Anchors32
        for pool in (self.roi_heads.box_roi_pool, self.roi_heads.mask_roi_pool):
            fix_scales(pool)
        # On the model's device; as lists they would be copied there for every image.
        for name in ("image_mean", "image_std"):
            values = torch.tensor(self.transform.__dict__.pop(name))
            self.transform.register_buffer(name, values, persistent=False)

    def forward(
        self,
        images: list[Tensor],
        targets: list[dict] | None = None,
        no_object: float = 1.0,
    ):
        if not self.training:
            return super().forward(images, targets)
        # torchvision calls the losses itself, without room for an argument more.
        self.rpn.no_object = self.roi_heads.no_object = no_object
        # torchvision's own five lines, written out because they do not return features.
        # First stage: boxes that may hold an object. Second stage: which class, and
        # which pixels. To the second stage proposals are constants: no gradient flows
        # back through their coordinates.
        batch, targets = self.transform(images, targets)
        features = self.backbone(batch.tensors)
        proposals, first = self.rpn(batch, features, targets)
        _, second = self.roi_heads(features, proposals, batch.image_sizes, targets)
        # What the five losses were means of, in the order of `losses.COUNT_OF`.
        anchors, samples = self.rpn.fg_bg_sampler, self.roi_heads.fg_bg_sampler
        counts = [self.rpn.weight, anchors.drawn.sum()]
        counts += [self.roi_heads.weight, samples.drawn.sum(), samples.positive.sum()]
        counts = torch.stack([count.float() for count in counts])
        return {**second, **first}, counts, features["0"]
