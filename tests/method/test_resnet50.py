"""ResNet-50: torchvision's own losses, and weights to start from.

Weights are files that the tests make: a ResNet-50's and a Mask R-CNN's state dict.
"""

import pytest
import torch
from helpers import batch
from torchvision.models import resnet50
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d

from ssis import UserError, model, networks


def test_losses_are_torchvisions_own():
    """A ResNet-50 built by torchvision alone, with the same weights and the same draw."""
    ours = networks.build_resnet50(4, 64, 64, "none").train()
    theirs = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=64
    ).train()
    theirs.load_state_dict(ours.state_dict())
    # They would resize, by nothing here, but a random size is drawn for it.
    theirs.transform._skip_resize = True
    images, targets = batch()
    torch.manual_seed(3)
    losses, *_ = ours(images, targets)
    torch.manual_seed(3)
    expected = theirs(images, targets)
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        torch.testing.assert_close(value, expected[name])


def test_resnet50_starts_from_a_classifiers_weights(tmp_path):
    classifier = resnet50(weights=None)
    torch.save(classifier.state_dict(), tmp_path / "r50.pth")
    net = networks.build("resnet50", 5, 96, 160, str(tmp_path / "r50.pth"))
    assert torch.equal(net.backbone.body.layer3[2].conv2.weight, classifier.layer3[2].conv2.weight)
    assert torch.equal(net.backbone.body.bn1.weight, classifier.bn1.weight)
    assert not net.backbone.body.conv1.weight.requires_grad
    # Constants: nothing that a batch could move.
    assert isinstance(net.backbone.body.bn1, FrozenBatchNorm2d)


def test_frozen_norms_have_torchvisions_values_in_the_type_of_their_input():
    torch.manual_seed(0)
    theirs, ours = FrozenBatchNorm2d(8), model.FrozenNorm(8)
    state = {name: torch.rand(8) + 0.5 for name in theirs.state_dict()}
    for norm in (theirs, ours):
        norm.load_state_dict(state)
    x = torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    # torchvision's is float32 here.
    half = ours(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), theirs(x), atol=0.05, rtol=0.05)


def test_anchors_are_exact_in_mixed_precision():
    """torchvision's follow the maps: at 800 x 1333 and in bf16, pixels beside the truth."""
    net = networks.build("resnet50", 5, 800, 1333)
    sides = [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]
    images = ImageList(torch.zeros(1, 3, 800, 1344), [(800, 1333)])
    exact, mixed, after = (
        net.rpn.anchor_generator(images, [torch.zeros(1, 1, *s, dtype=kind) for s in sides])[0]
        for kind in (torch.float32, torch.bfloat16, torch.float32)
    )
    assert mixed.dtype == torch.float32 and torch.equal(mixed, exact)
    # Nor does training leave anything behind for an evaluation without it.
    assert torch.equal(after, exact)
    # torchvision's own, in float32.
    sizes, ratios = net.rpn.anchor_generator.sizes, net.rpn.anchor_generator.aspect_ratios
    theirs = AnchorGenerator(sizes, ratios)
    assert torch.equal(exact, theirs(images, [torch.zeros(1, 1, *s) for s in sides])[0])
    # What the docstring of `model.Anchors32` says of theirs in bf16.
    wrong = theirs(images, [torch.zeros(1, 1, *s, dtype=torch.bfloat16) for s in sides])[0]
    off = (wrong.float() - exact).abs().amax(dim=1)
    assert off.max().round() == 7 and (off > 0).float().mean() == pytest.approx(2 / 3, abs=0.02)


def test_resnet50_starts_from_a_mask_rcnns_weights_with_other_classes(tmp_path):
    theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    torch.save(theirs.state_dict(), tmp_path / "mask_rcnn.pth")
    net = networks.build("resnet50", 5, 96, 160, str(tmp_path / "mask_rcnn.pth"))
    assert torch.equal(net.roi_heads.box_head.fc7.weight, theirs.roi_heads.box_head.fc7.weight)
    assert net.roi_heads.box_predictor.cls_score.out_features == 5
    # Without weights nothing is downloaded, and the norms are trained.
    fresh = networks.build("resnet50", 5, 96, 160)
    assert fresh.backbone.body.bn1.weight.requires_grad


def test_weights_of_something_else_are_refused(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    for name, line in (("other.pth", "not of this model"), ("absent.pth", "readable state dict")):
        source = str(tmp_path / name)
        with pytest.raises(UserError, match=line):
            networks.build("resnet50", 5, 96, 160, source)
