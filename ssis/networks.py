r"""The three networks that are trained: small, ResNet-50, timm.

All are `model.MaskRCNN`; they differ in their backbone and in the size of their heads.

* `resnet50`: torchvision's ResNet-50-FPN, for real data, from ImageNet or COCO weights;
* `small`: the same design, a twentieth of the size (2.4 against 44 million weights),
  trained from scratch in minutes on a CPU. It is narrower and shallower, its backbone
  ends at stride 16, and it takes one sample per RoI bin: four take a third more time
  per step for a little more AP (docs/log.md, docs/performance.md);
* `timm`: the small one's FPN and heads on a backbone of the timm library, most of which
  are light and come with ImageNet weights. From these, a few dozen labeled photographs
  can be learned on a CPU, which no network can from scratch.

Chain: 7 of 24. Read next: `ssis/inference.py`, what a network says of an image.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.detection import mask_rcnn
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import (
    BackboneWithFPN,
    _resnet_fpn_extractor,
)
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ssis.io import timm_backbone
from ssis.io.backbone_weights import load_matching, read_weights
from ssis.model import FrozenNorm, MaskRCNN


def build_small(num_classes: int, min_size: int, max_size: int) -> MaskRCNN:
    """A ResNet-10 Mask R-CNN for small images; random weights.

    Args:
        num_classes: C + 1, background included.
        min_size: short side that images are resized to in evaluation, pixels.
        max_size: limit of their long side, pixels.
    """
    # One block a stage where ResNet-18 has two.
    body = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    # Strides 4, 8 and 16 only: at stride 32 an image of 96 pixels has 3 x 3 cells left.
    # (The RPN gets a fourth level, by the FPN's max-pool.) D = 64 channels on every
    # level (torchvision: 256).
    backbone = BackboneWithFPN(
        body, {"layer1": "0", "layer2": "1", "layer3": "2"}, [64, 128, 256], 64
    )
    # One anchor size a level, four times its stride (torchvision: eight times), at the
    # fourth three times: the objects of small images are small.
    anchors = (16, 32, 64, 96)
    return light_heads(
        backbone, num_classes, anchors, min_size=min_size, max_size=max_size
    )


def light_heads(
    backbone: nn.Module, num_classes: int, anchors: tuple[int, ...], **settings
) -> MaskRCNN:
    """RPN and heads of a fraction of torchvision's size, on a given backbone.

    Args:
        backbone: with 64 channels on its levels, "0" of stride 4, "1" of 8, and so on.
        num_classes: C + 1.
        anchors: a size for each level, and for the one that the FPN's max-pool adds.
        settings: further ones of torchvision's Mask R-CNN.
    """
    levels = [str(k) for k in range(len(anchors) - 1)]
    return MaskRCNN(
        backbone,
        **settings,
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in anchors), ((0.5, 1.0, 2.0),) * len(anchors)
        ),
        # How many of the best anchors are kept: of each level before NMS, of the image
        # after it (torchvision: 2000, and 1000 in evaluation). A small image has few
        # objects, and at 96 x 96 pixels 2,295 anchors in all.
        rpn_pre_nms_top_n_train=400,
        rpn_pre_nms_top_n_test=400,
        rpn_post_nms_top_n_train=200,
        rpn_post_nms_top_n_test=200,
        # Anchors of an image that the RPN's two losses are a mean over; half of them
        # foreground, if there are so many (torchvision: 256).
        rpn_batch_size_per_image=128,
        # Proposals of an image that the second stage is trained on (torchvision: 512);
        # a quarter of them, 8, foreground, at 1 to 4 instances an image. Twice as many
        # cost 40 % more time per step (docs/performance.md).
        box_batch_size_per_image=32,
        # 7 x 7 cells of 64 channels into two layers of 256 (torchvision: 1024), and
        # from these C + 1 logits and a box for each class.
        box_roi_pool=MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=1),
        box_head=TwoMLPHead(64 * 7 * 7, 256),
        box_predictor=FastRCNNPredictor(256, num_classes),
        # 14 x 14 cells through two convolutions of 64 channels (torchvision: four of
        # 256), doubled by a transposed one: 28 x 28 pixels for each class.
        mask_roi_pool=MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=1),
        mask_head=mask_rcnn.MaskRCNNHeads(64, (64, 64), 1),
        mask_predictor=mask_rcnn.MaskRCNNPredictor(64, 64, num_classes),
    )


def set_detections(net: nn.Module, count: int) -> None:
    """Let a Mask R-CNN find up to `count` instances in an image.

    Its first stage must propose more: twice as many at least, in evaluation.
    """
    net.roi_heads.detections_per_img = count
    for limits in (net.rpn._pre_nms_top_n, net.rpn._post_nms_top_n):
        limits["testing"] = max(limits["testing"], 2 * count)


class TimmFPN(nn.Module):
    """A backbone of timm under torchvision's feature pyramid, 64 channels wide.

    Args:
        body: of `timm.create_model(.., features_only=True)`: an image into a list of
            maps.
    """

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body, self.out_channels = body, 64
        self.fpn = FeaturePyramidNetwork(
            body.feature_info.channels(), self.out_channels, LastLevelMaxPool()
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.body(images)
        return self.fpn(OrderedDict((str(k), x) for k, x in enumerate(maps)))


def build_timm(
    num_classes: int,
    min_size: int,
    max_size: int,
    name: str,
    weights: str,
    trained_stages: int = 3,
    fetch: bool = True,
) -> MaskRCNN:
    """The small model's FPN and heads on a backbone of timm.

    Args:
        num_classes, min_size, max_size: as for `build_small`.
        name: of the backbone, as timm has it.
        weights: "none", "imagenet" (timm's own), or the path of a state dict with
            timm's names.
        trained_stages, fetch: as for `build_resnet50`.

    Raises:
        UserError: no timm, no such backbone, or weights that do not fit.
    """
    body, mean, std = timm_backbone.load(name, weights if fetch else "none")
    if weights != "none":
        # As for ResNet-50: norms and first stages stay as they are.
        body = timm_backbone.freeze(body, trained_stages)
    # Strides 4 to 32, and 64 for the RPN alone. Anchors are four times the stride, as
    # in the small model.
    anchors = tuple(4 * stride for stride in (*body.feature_info.reduction(), 64))
    model = light_heads(
        TimmFPN(body),
        num_classes,
        anchors,
        min_size=min_size,
        max_size=max_size,
        image_mean=mean,
        image_std=std,
    )
    # Light backbones have convolutions within single channels, which are a third faster
    # with the channels of a pixel side by side.
    return model.to(memory_format=torch.channels_last)


def build_resnet50(
    num_classes: int,
    min_size: int,
    max_size: int,
    weights: str,
    trained_stages: int = 3,
    fetch: bool = True,
) -> MaskRCNN:
    """torchvision's ResNet-50-FPN Mask R-CNN.

    Args:
        num_classes, min_size, max_size: as for `build_small`.
        weights: "none", "imagenet", "coco", or the path of a state dict: of a ResNet-50
            (`fc.` keys are ignored) or of a whole Mask R-CNN (its last layers are
            ignored where the number of classes differs).
        trained_stages: how many of the backbone's five stages learn, from the top; the
            others keep their pretrained weights. Without weights all of them learn.
        fetch: load them; False builds the same model with random values, to be filled
            from a checkpoint.

    With any weights but "none" BatchNorm's statistics are frozen, since the few images
    of a step would estimate them badly. torchvision does the same.

    Raises:
        UserError: no network, no such file, or a file that does not fit.
    """
    # The pretrained statistics are kept, so the norms are frozen; without weights there
    # is nothing to keep, and they learn.
    pretrained = weights != "none"
    norm = FrozenNorm if pretrained else nn.BatchNorm2d
    backbone = _resnet_fpn_extractor(
        resnet.resnet50(weights=None, norm_layer=norm),
        trained_stages if pretrained else 5,
    )
    model = MaskRCNN(backbone, num_classes, min_size=min_size, max_size=max_size)
    if weights == "coco":
        # torchvision trained these with norms whose epsilon is 0. For a file given by
        # its path this is not known; fine-tuning makes up for the difference.
        overwrite_eps(model, 0.0)
    if pretrained and fetch:
        # A whole Mask R-CNN, or a backbone alone: the names tell which.
        state = read_weights(weights)
        if any(name.startswith("backbone.") for name in state):
            load_matching(model, state, weights)
        else:
            load_matching(model.backbone.body, state, weights)
    return model


def build(
    kind: str,
    num_classes: int,
    short_side: int,
    long_side: int,
    weights: str = "none",
    trained_stages: int = 3,
    backbone: str = "",
    fetch: bool = True,
) -> MaskRCNN:
    """A model of one of the three kinds, on the CPU.

    Args:
        kind: "small", "resnet50" or "timm".
        num_classes: C + 1.
        short_side, long_side: sides of an image in evaluation, pixels.
        weights, trained_stages: of `build_resnet50` and `build_timm`; the small model
            has random weights, and all of it learns.
        backbone: name of the timm backbone.
        fetch: of `build_resnet50` and `build_timm`.

    Raises:
        ValueError: another kind.
    """
    if kind == "small":
        return build_small(num_classes, short_side, long_side)
    if kind == "resnet50":
        return build_resnet50(
            num_classes, short_side, long_side, weights, trained_stages, fetch
        )
    if kind == "timm":
        return build_timm(
            num_classes, short_side, long_side, backbone, weights, trained_stages, fetch
        )
    raise ValueError(f"no model {kind!r}: small, resnet50 or timm")


def start_afresh(net: MaskRCNN, seed: int, kind: str, *settings) -> None:
    """Set a network to new first weights: GD's student after pretraining.

    Args:
        net: changed in place, so that optimizer and DDP keep their parameters.
        seed: of the run; the new weights are drawn from another one.
        kind, settings: of `build`, but the number of classes.
    """
    # In a fork of the random state: all draws of the run that follow are the same as
    # without the fresh start. Far from all seeds of a study, or the weights would be
    # the first ones of this run or of another. They are drawn on the CPU; no GPU's
    # generator is touched.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed + 10**6)
        num_classes = net.roi_heads.box_predictor.cls_score.out_features
        fresh = build(kind, num_classes, *settings)
    net.load_state_dict(fresh.state_dict())
