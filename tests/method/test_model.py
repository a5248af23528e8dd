"""The model: counts that say what losses were averaged over, weights of the mask loss.

That its losses are torchvision's own is in test_resnet50.py.
"""

import math

import pytest
from helpers import batch
import torch

from ssis import model, networks, teacher

pytestmark = pytest.mark.fast


def test_small_boxes_far_from_the_corner_survive_bf16():
    """Beyond 1024 pixels a bf16 coordinate is a multiple of 8: a 3-pixel box would vanish."""
    coder = networks.build_small(4, 64, 96).roi_heads.box_coder
    box = torch.tensor([[1025.0, 8.0, 1028.0, 12.0]])
    codes = coder.encode([box], [box])[0].repeat(1, 4).bfloat16()
    decoded = coder.decode(codes, [box])
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded[0, 0], box[0])


def test_a_model_is_its_state_dict_whatever_batch_it_saw_first():
    """torchvision guesses the RoI strides from the first batch and keeps the guess."""
    first, second = networks.build_small(4, 48, 48).eval(), networks.build_small(4, 48, 48).eval()
    second.load_state_dict(first.state_dict())
    image = torch.rand(3, 48, 48)
    with torch.no_grad():
        # 40 pixels padded to 64: read from the padded size, the stride would be 2.
        teacher.predict(first, [torch.rand(3, 40, 40)], 0.2)
    scores = [teacher.predict(net, [image], 0.2)[0].class_quality for net in (first, second)]
    assert torch.equal(*scores) and len(scores[0]) > 0
    assert first.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16]


def test_counts_are_what_the_losses_were_averaged_over():
    net = networks.build_small(4, 64, 96).train()
    # So many that all anchors and proposals are taken, and the numbers can be predicted.
    net.rpn.fg_bg_sampler.batch_size_per_image = 10**6
    net.roi_heads.fg_bg_sampler.batch_size_per_image = 10**6
    seen = {}
    select = net.roi_heads.select_training_samples

    def spy(*args):
        result = select(*args)
        seen["labels"] = torch.cat(result[2])
        return result

    net.roi_heads.select_training_samples = spy
    _, counts, _ = net(*batch(), 0.25)
    weight_of_anchors, anchors, weight, proposals, foreground = counts.tolist()
    assert 0 < anchors <= 2 * 3 * (16 * 16 + 8 * 8 + 4 * 4 + 2 * 2)
    assert proposals == len(seen["labels"])
    assert foreground == (seen["labels"] > 0).sum() >= 3
    assert weight == foreground + 0.25 * (proposals - foreground)
    objects = net.rpn.fg_bg_sampler.positive.sum()
    assert weight_of_anchors == objects + 0.25 * (anchors - objects)


def test_the_first_stage_with_weight_one_is_torchvisions_and_with_less_a_weighted_mean():
    """GD Eq. (no object) in the RPN: against torchvision, and against a loop over anchors."""
    net = networks.build_small(4, 64, 96).train()
    objectness, deltas = torch.randn(40, 1) * 20, torch.randn(40, 4)
    labels = [torch.tensor([1.0] * 3 + [0.0] * 15 + [-1.0] * 2), torch.tensor([0.0] * 20)]
    targets = [torch.randn(20, 4), torch.randn(20, 4)]
    found = {}
    for name, compute, w in (
        ("theirs", model.RegionProposalNetwork.compute_loss, 1.0),
        ("ours", model.WeightedRPN.compute_loss, 1.0),
        ("a tenth", model.WeightedRPN.compute_loss, 0.1),
    ):
        net.rpn.no_object = w
        torch.manual_seed(5)
        found[name] = compute(net.rpn, objectness, deltas, labels, targets)
    torch.testing.assert_close(found["ours"], found["theirs"])
    assert found["a tenth"][1] == found["ours"][1]
    above, below = 0.0, 0.0
    for z, label, drawn in zip(
        objectness[:, 0].tolist(), torch.cat(labels).tolist(),
        net.rpn.fg_bg_sampler.drawn.tolist(), strict=True,
    ):  # fmt: skip
        if drawn:
            weight = 1.0 if label else 0.1
            above += weight * (math.log1p(math.exp(-abs(z))) + max(z, 0) - z * label)
            below += weight
    assert found["a tenth"][0].item() == pytest.approx(above / below, rel=1e-4)


def test_the_sampler_counts_its_draw():
    """Two images: 10 and 1 positives, 90 and 2 negatives; at most 8 positives of 16 each."""
    sampler = model.CountingSampler(16, 0.5)
    matched = [
        torch.cat([torch.ones(10), torch.zeros(90), -torch.ones(5)]),
        torch.cat([torch.zeros(2), torch.ones(1), -torch.ones(7)]),
    ]
    positive, negative = sampler(matched)
    assert [mask.sum().item() for mask in positive] == [8, 1]
    assert [mask.sum().item() for mask in negative] == [8, 2]
    assert sampler.positive.sum() == 9 and sampler.drawn.sum() == 19
    # Over both images together, in order.
    assert torch.equal(sampler.positive, torch.cat(positive).bool())


def test_the_second_stage_without_weights_is_torchvisions():
    """The same draw of proposals: the same four losses."""
    net = networks.build_small(4, 64, 96).train()
    images, targets = batch((2, 1))
    targets[0]["labels"] = torch.tensor([1, 3])
    features = net.backbone(torch.stack(images))
    # Boxes near the instances, and others; the background ones come first.
    near = targets[0]["boxes"].repeat(4, 1) + 2 * torch.randn(8, 4)
    far = torch.tensor([[40.0, 0.0, 60.0, 20.0], [0.0, 40.0, 8.0, 60.0]])
    proposals = [torch.cat([far, near]), torch.cat([far, near])]
    found = []
    for forward in (model.RoIHeads.forward, model.WeightedRoIHeads.forward):
        torch.manual_seed(5)
        sizes = [(64, 64), (64, 64)]
        _, losses = forward(net.roi_heads, features, proposals, sizes, targets)
        found.append(losses)
    assert found[0].keys() == found[1].keys() and found[0]["loss_mask"] > 0.1
    for name, loss in found[0].items():
        torch.testing.assert_close(found[1][name], loss)


def test_a_negative_image_is_legal_and_has_no_mask_loss():
    net = networks.build_small(4, 64, 96).train()
    losses, counts, _ = net(*batch(instances=(0, 0)))
    assert counts[4] == 0 and losses["loss_mask"] == 0 and losses["loss_classifier"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_training_does_not_resize():
    net = networks.build_small(4, 32, 40).train()
    images, targets = batch()
    assert net.transform(images, targets)[0].image_sizes == [(64, 64), (64, 64)]
    assert net.eval().transform(images)[0].image_sizes == [(32, 32), (32, 32)]


def test_mask_weights_of_one_change_nothing_and_of_zero_leave_no_gradient():
    """PL-DC's pixel level: aligned as the masks are, so that 1 is torchvision's own loss."""
    net = networks.build_small(4, 64, 96).train()
    last = net.roi_heads.mask_predictor.mask_fcn_logits.weight
    found = {}
    for weight in (None, 1.0, 0.0, 0.5):
        images, targets = batch()
        if weight is not None:
            for target in targets:
                target["mask_weights"] = torch.full(target["masks"].shape, weight)
        torch.manual_seed(3)
        net.zero_grad()
        losses, *_ = net([torch.ones(3, 64, 64) * 0.3 for _ in images], targets)
        losses["loss_mask"].backward()
        found[weight] = (losses["loss_mask"].item(), last.grad.abs().sum().item())
    assert found[1.0][0] == pytest.approx(found[None][0], abs=1e-6)
    assert found[0.5][0] == pytest.approx(found[None][0] / 2, abs=1e-6)
    assert found[0.0] == (0, 0) and found[None][1] > 0


def test_mask_weights_go_where_the_mask_goes():
    """Weights of the object's own shape: only what the target calls foreground counts."""
    net = networks.build_small(4, 64, 96).train()
    images, targets = batch((1, 1))
    for target in targets:
        target["mask_weights"] = target["masks"].float()
    seen = {}

    def spy(logits, labels, aligned, weights):
        seen.update(aligned=aligned, weights=weights)
        return logits.sum() * 0.0

    before, model.losses.mask_loss = model.losses.mask_loss, spy
    try:
        net(images, targets)
    finally:
        model.losses.mask_loss = before
    assert 0 < seen["aligned"].mean() < 1
    assert torch.equal(seen["aligned"], seen["weights"])
