"""ResNet-50: torchvision's own losses, and weights to start from.

Weights are files that the tests make: a ResNet-50's and a Mask R-CNN's state dict.
"""

import pytest
import torch
from helpers import batch
from torchvision.models import resnet50
from torchvision.models.detection import maskrcnn_resnet50_fpn

from ssis import UserError, model


def test_losses_are_torchvisions_own():
    """A ResNet-50 built by torchvision alone, with the same weights and the same draw."""
    ours = model.build_resnet50(4, 64, 64, "none").train()
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
    net = model.build("resnet50", 5, 96, 160, str(tmp_path / "r50.pth"))
    assert torch.equal(net.backbone.body.layer3[2].conv2.weight, classifier.layer3[2].conv2.weight)
    assert torch.equal(net.backbone.body.bn1.weight, classifier.bn1.weight)
    assert not net.backbone.body.conv1.weight.requires_grad
    assert type(net.backbone.body.bn1).__name__ == "FrozenBatchNorm2d"


def test_resnet50_starts_from_a_mask_rcnns_weights_with_other_classes(tmp_path):
    theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    torch.save(theirs.state_dict(), tmp_path / "mask_rcnn.pth")
    net = model.build("resnet50", 5, 96, 160, str(tmp_path / "mask_rcnn.pth"))
    assert torch.equal(net.roi_heads.box_head.fc7.weight, theirs.roi_heads.box_head.fc7.weight)
    assert net.roi_heads.box_predictor.cls_score.out_features == 5
    # Without weights nothing is downloaded, and the norms are trained.
    fresh = model.build("resnet50", 5, 96, 160)
    assert fresh.backbone.body.bn1.weight.requires_grad


def test_weights_of_something_else_are_refused(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    for name, line in (("other.pth", "not of this model"), ("absent.pth", "readable state dict")):
        source = str(tmp_path / name)
        with pytest.raises(UserError, match=line):
            model.build("resnet50", 5, 96, 160, source)
