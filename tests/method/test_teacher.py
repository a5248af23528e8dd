"""The teacher: EMA by hand, predictions against torchvision's own, qualities by hand."""

import copy

import pytest
import torch
from torch.nn import functional as F

from torchvision.models.detection.roi_heads import (
    paste_masks_in_image,
    project_masks_on_boxes,
)

from ssis import inference, model, networks, teacher

pytestmark = pytest.mark.fast


def small(seed: int = 0) -> model.MaskRCNN:
    torch.manual_seed(seed)
    return networks.build_small(4, 64, 96)


def test_ema_is_the_formula_over_parameters_and_float_buffers():
    student = small()
    student.train()(*batch())  # gives BatchNorm statistics other than their first values
    ema = teacher.make_teacher(student)
    expected = copy.deepcopy(student.state_dict())
    for seed in range(1, 4):
        student = small(seed)
        for _ in range(seed):
            student.train()(*batch())
        teacher.ema_update(ema, student, 0.9)
        for name, value in student.state_dict().items():
            if value.is_floating_point():
                expected[name] = 0.9 * expected[name] + 0.1 * value
            else:
                expected[name] = value
    assert any("running_var" in name for name in expected)
    assert expected["backbone.body.bn1.num_batches_tracked"] == 3
    for name, value in expected.items():
        torch.testing.assert_close(ema.state_dict()[name], value)


def test_ema_by_hand_on_one_layer():
    """Three students of one layer: weights, bias and the running mean of its BatchNorm."""

    def student(value: float) -> torch.nn.Sequential:
        net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1))
        for tensor in (*net.parameters(), net[1].running_mean, net[1].running_var):
            tensor.data.fill_(value)
        net[1].num_batches_tracked.fill_(int(value))
        return net

    first = student(1.0)
    ema = teacher.make_teacher(first)
    # 0.75 x 1 + 0.25 x 5 = 2 and 0.75 x 2 + 0.25 x 10 = 4.
    for value, expected in ((5.0, 2.0), (10.0, 4.0)):
        teacher.ema_update(ema, student(value), 0.75)
        layer, norm = ema
        for tensor in (layer.weight, layer.bias, norm.weight, norm.running_mean, norm.running_var):
            torch.testing.assert_close(tensor.flatten(), torch.tensor([expected]))
        # Batches are counted, not averaged.
        assert norm.num_batches_tracked == int(value)
    # The student goes its own way.
    assert first[0].weight.item() == 1.0


def test_the_teacher_is_a_frozen_copy_and_never_in_training_mode():
    student = small().train()
    ema = teacher.make_teacher(student)
    assert not ema.training and student.training
    assert not any(p.requires_grad for p in ema.parameters())
    assert all(map(torch.equal, ema.state_dict().values(), student.state_dict().values()))


def batch():
    boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0], [30.0, 20.0, 60.0, 50.0]])
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[0, 8:40, 8:40] = 1
    masks[1, 20:50, 30:60] = 1
    target = dict(boxes=boxes, labels=torch.tensor([1, 3]), masks=masks)
    return [torch.rand(3, 64, 64), torch.rand(3, 64, 64)], [target, target]


def test_predictions_are_torchvisions():
    """Same boxes, labels and scores as the model's own inference; masks nearly so."""
    net = small().eval()
    net.roi_heads.score_thresh = 0.26
    # The image sizes are such that torchvision resizes nothing.
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 96)]
    with torch.no_grad():
        theirs = net(images)
    ours = teacher.predict(net, images, 0.26)
    assert sum(map(len, ours)) > 5
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.boxes, b["boxes"])
        assert torch.equal(a.labels, b["labels"])
        torch.testing.assert_close(a.class_quality, b["scores"])
        # Pasted half a pixel away from torchvision's: the next test says why.
        assert (a.mask_probs - b["masks"][:, 0]).abs().mean() < 0.05


def test_a_true_mask_made_a_target_and_pasted_again_is_itself():
    """What the mask head is asked to predict, pasted: no shift, and better than theirs."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    ious, shifts = {"ours": [], "torchvision": []}, {"ours": [], "torchvision": []}
    for _ in range(100):
        cx, cy = 30 + 30 * torch.rand(2, generator=generator)
        radius = 6 + 12 * torch.rand((), generator=generator)
        disc = (x - cx) ** 2 + (y - cy) ** 2 < radius**2
        box = torch.stack([cx - radius, cy - radius, cx + radius, cy + radius])[None]
        box = box + torch.randn(1, 4, generator=generator)
        target = project_masks_on_boxes(disc[None].float(), box, torch.tensor([0]), 28)
        pasted = dict(
            ours=inference.paste(target[:, None], box, (96, 96))[0],
            torchvision=paste_masks_in_image(target[:, None], box, (96, 96))[0, 0],
        )
        for who, soft in pasted.items():
            mask = soft > 0.5
            ious[who].append((mask & disc).sum() / (mask | disc).sum())
            shifts[who].append((x[mask].mean() - x[disc].mean()).item())
    mean = {who: sum(values) / 100 for who, values in shifts.items()}
    assert abs(mean["ours"]) < 0.1 < 0.3 < abs(mean["torchvision"])
    assert sum(ious["ours"]) / 100 > 0.95 > 0.93 > sum(ious["torchvision"]) / 100


def test_the_distribution_belongs_to_the_detection():
    found = teacher.predict(small().eval(), [torch.rand(3, 64, 64)], 0.2)[0]
    assert len(found) > 3 and found.distribution.shape == (len(found), 3)
    rows = torch.arange(len(found))
    assert torch.equal(found.distribution[rows, found.labels - 1], found.class_quality)
    assert (found.distribution.sum(1) <= 1 + 1e-6).all()


def test_the_features_of_a_box_are_the_same_found_or_given():
    net = small().eval()
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 96)]
    found = teacher.predict(net, images, 0.25)
    given = inference.features_in(net, images, [p.boxes for p in found])
    for pseudo, features in zip(found, given, strict=True):
        assert features.shape == (len(pseudo), 64, 7, 7)
        torch.testing.assert_close(pseudo.features, features, atol=1e-5, rtol=1e-4)


def test_one_image_alone_and_in_a_batch_give_the_same():
    net = small().eval()
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    together = teacher.predict(net, images, 0.25)
    for image, expected in zip(images, together, strict=True):
        alone = teacher.predict(net, [image], 0.25)[0]
        torch.testing.assert_close(alone.boxes, expected.boxes, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(alone.class_quality, expected.class_quality)


def test_no_prediction_is_an_empty_pseudo_label_not_an_error():
    found = teacher.predict(small().eval(), [torch.rand(3, 64, 64)], 0.999)[0]
    assert len(found) == 0 and found.mask_probs.shape == (0, 64, 64)
    assert found.target()["boxes"].shape == (0, 4)


def test_mask_quality_by_hand():
    probs = torch.tensor([[[0.9, 0.7], [0.5, 0.1]], [[0.2, 0.1], [0.0, 0.5]]])
    # Foreground of the first: 0.9 and 0.7 (0.5 is not above 0.5); of the second: none.
    torch.testing.assert_close(teacher.mask_quality(probs), torch.tensor([0.8, 0.0]))


def test_masks_pasted_within_their_boxes_are_those_pasted_in_the_whole_frame():
    """The form without a loop, over all pixels of the frame, is the oracle."""
    height, width, shift = 23, 31, (0.5, 2.0)
    boxes = torch.tensor(
        [
            [3.2, 4.7, 20.1, 15.3],
            [0.0, 0.0, 31.0, 23.0],  # the whole frame
            [-6.0, -3.5, 7.9, 5.0],  # across its edge
            [25.0, 18.0, 40.0, 30.0],
            [40.0, 30.0, 50.0, 35.0],  # beside it
            [5.0, 5.0, 5.4, 20.0],  # no pixel's center
        ]
    )
    small = torch.rand(len(boxes), 1, 28, 28)
    x, y = torch.arange(width)[None] + 0.5, torch.arange(height)[None] + 0.5
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)
    across = 2 * (x - shift[1] - x1) / (x2 - x1) - 1
    down = 2 * (y - shift[0] - y1) / (y2 - y1) - 1
    grid = torch.stack(torch.broadcast_tensors(across[:, None], down[:, :, None]), dim=3)
    soft = F.grid_sample(small, grid, padding_mode="border", align_corners=False)[:, 0]
    inside = ((x >= x1) & (x <= x2))[:, None] & ((y >= y1) & (y <= y2))[:, :, None]
    pasted = inference.paste(small, boxes, (height, width), shift)
    torch.testing.assert_close(pasted, soft * inside)
    assert (pasted.flatten(1).sum(1) > 0).tolist() == [True] * 4 + [False] * 2
    assert inference.paste(small[:0], boxes[:0], (height, width)).shape == (0, height, width)


def test_detections_are_torchvisions_with_the_whole_distribution():
    """Forty random proposals, three classes; the oracle is torchvision's second stage."""
    roi, size = small().roi_heads, (64, 96)
    roi.score_thresh, roi.nms_thresh = 0.2, 0.3
    corner = torch.rand(40, 2) * torch.tensor([80.0, 50.0])
    proposals = torch.cat([corner, corner + 6 + 30 * torch.rand(40, 2)], dim=1)
    logits, regression = 2 * torch.randn(40, 4), 2 * torch.randn(40, 16)
    # One that regression leaves without a width.
    regression[0, 2::4] = -1000
    probs = logits.softmax(dim=1)
    decoded = roi.box_coder.decode(regression, [proposals])
    for limit in (1000, 7):
        roi.detections_per_img = limit
        theirs = roi.postprocess_detections(logits, regression, [proposals], [size])
        ours = inference.select_detections(decoded, probs, size, 0.2, 0.3, limit)
        boxes, labels, scores, distributions = ours
        torch.testing.assert_close(boxes, theirs[0][0])
        torch.testing.assert_close(scores, theirs[1][0])
        assert torch.equal(labels, theirs[2][0])
        assert len(labels) == 7 if limit == 7 else len(labels) > 12
        # Each distribution is that of one proposal, without its background.
        assert distributions.shape == (len(labels), 3)
        assert torch.equal(distributions[torch.arange(len(labels)), labels - 1], scores)
        away = (distributions[:, None] - probs[None, :, 1:]).abs().sum(dim=2)
        assert away.amin(dim=1).max() == 0
