"""S4M's refinement: points by hand and by frequency, frames as a property, gate by hand."""

import copy
import dataclasses
import math

import pytest
import torch

from ssis import augment, inference, refine, sam
from ssis.targets import boxes_of, mask_iou
from ssis.io.embeddings import Embeddings
from ssis.teacher import PseudoLabels, mask_quality

pytestmark = pytest.mark.fast


def labels_of(mask_probs: torch.Tensor) -> PseudoLabels:
    """Pseudo-labels with given soft masks."""
    n, masks = len(mask_probs), mask_probs > 0.5
    return PseudoLabels(
        boxes_of(masks), torch.arange(n) % 3 + 1, torch.full((n,), 0.9),
        mask_quality(mask_probs), mask_probs, masks, torch.full((n, 3), 0.3),
        torch.zeros(n, 1, 7, 7), torch.zeros(n, 1, 28, 28), boxes_of(masks),
    )  # fmt: skip


def frame(height: int, width: int, flip: bool) -> augment.Geometry:
    """A view of the whole image of `Drawn`, at some size."""
    return augment.Geometry((64, 96), (height, width), (0, 0), (height, width), flip)


def how(rule: str = "agreement", gate: float = 0.5) -> tuple:
    """Arguments of `refine.refine`: rule, points, sampling, gate, calibrate, min_area."""
    return rule, 3, "paper", gate, False, 5


class Drawn:
    """A dataset of the one image of a bright disc on a dark ground, 64 high, 96 wide."""

    def __init__(self):
        y, x = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(96) + 0.5, indexing="ij")
        self.mask = (x - 40) ** 2 + (y - 30) ** 2 < 14**2
        noise = torch.randint(0, 20, (3, 64, 96), generator=torch.Generator().manual_seed(0))
        self.pixels = (30 + 170 * self.mask + noise).to(torch.uint8)

    def image(self, index: int) -> torch.Tensor:
        return self.pixels


@pytest.fixture(scope="module")
def embeddings():
    tiny = sam.SegmentAnything("tiny", "", "cpu")
    return Embeddings(tiny, Drawn())


def test_points_are_drawn_by_the_masks_probability():
    probs = torch.zeros(2, 4, 5)
    probs[:, 1, 2], probs[:, 2, 3], probs[:, 0, 0] = 0.6, 0.9, 0.4
    generator = torch.Generator().manual_seed(0)

    def shares(weights: torch.Tensor) -> dict:
        counts: dict = {}
        for _ in range(2000):
            for point in refine.sample_points(weights, 1, generator)[:, 0].tolist():
                counts[tuple(point)] = counts.get(tuple(point), 0) + 1
        return {point: n / 4000 for point, n in counts.items()}

    # S4M Eq. (PR sampling): 0.6 and 0.9 of 1.5; a pixel under 0.5 never.
    paper = shares(refine.point_weights(labels_of(probs), "paper"))
    assert sorted(paper) == [(2.5, 1.5), (3.5, 2.5)]
    assert paper[(3.5, 2.5)] == pytest.approx(0.6, abs=0.03)


def test_the_released_codes_points_are_a_softmax_over_the_logits():
    """In a box of 28 x 28 pixels every logit is one pixel's; logits of 30 are told apart."""
    logits = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    logits[0, 0, 4:8, 6:10], logits[0, 0, 19:23, 2:6] = 30.0, 31.0
    boxes = torch.tensor([[4.0, 2.0, 32.0, 30.0], [0.0, 0.0, 28.0, 28.0]])
    size = (34, 40)
    soft = torch.zeros(2, *size)
    soft[:, 2:28, 4:28] = 0.9
    pseudo = dataclasses.replace(labels_of(soft), mask_logits=logits, feature_boxes=boxes)
    weights = refine.point_weights(pseudo, "code")
    # As written, pixel by pixel, for pasting that shifts by half a pixel (`inference.paste`).
    pasted = inference.paste(logits, boxes, size)
    for n, (left, top) in enumerate([(4, 2), (0, 0)]):
        exp = {
            (y, x): math.exp(pasted[n, y, x].item())
            for y in range(top, top + 28)
            for x in range(left, left + 28)
        }
        whole = sum(exp.values())
        for y in range(size[0]):
            for x in range(size[1]):
                wanted = exp.get((y, x), 0.0) / whole
                assert weights[n, y, x].item() == pytest.approx(wanted, rel=1e-3, abs=1e-9)
    # Of two patches of which float32 has the same probability, 1, one is e times as likely.
    other, best = weights[0, 5:11].max(), weights[0, 20:26].max()
    assert (logits[0].sigmoid() == 1).sum() == 32
    assert best / other == pytest.approx(math.e, rel=1e-3)


def test_points_differ_while_there_are_enough_and_never_leave_the_mask():
    probs = torch.zeros(3, 6, 6)
    probs[0] = 0.9
    probs[1, 2, 3] = 0.8
    probs[2, 5, 4:6] = 0.7
    weights = refine.point_weights(labels_of(probs), "paper")
    points = refine.sample_points(weights, 3, torch.Generator().manual_seed(1))
    assert len({tuple(p) for p in points[0].tolist()}) == 3
    assert points[1].tolist() == [[3.5, 2.5]] * 3
    assert {tuple(p) for p in points[2].tolist()} == {(4.5, 5.5), (5.5, 5.5)}
    assert refine.sample_points(probs[:0], 3, torch.Generator()).shape == (0, 3, 2)


def test_points_are_those_of_multinomial():
    """The same race, the same numbers; only without its checks."""
    weights = torch.rand(5, 7, 9)
    width = weights.shape[2]
    first, second = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    points = refine.sample_points(weights, 3, first)
    index = torch.multinomial(weights.flatten(1) + 1e-12, 3, generator=second)
    expected = torch.stack([index % width, index // width], dim=2).float() + 0.5
    assert torch.equal(points, expected)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (32, 48), (100, 150)])
def test_points_and_masks_travel_between_view_and_original(size, flip):
    """A map of the original, shown in the view, is met where the points say it is."""
    geometry = augment.Geometry((64, 96), size, (0, 0), size, flip)
    image = torch.zeros(3, 64, 96, dtype=torch.uint8)
    image[:, 10:30, 20:40] = 255
    shown = augment.F.resize(image, list(size), antialias=False)
    view = geometry.to_view(shown)
    y, x = torch.where(view[0] > 250)
    found = geometry.to_original(torch.stack([x, y], dim=1) + 0.5)
    # Every pixel of the view's square comes from the original's.
    assert (found >= torch.tensor([19.0, 9.0])).all()
    assert (found <= torch.tensor([41.0, 31.0])).all()
    assert found.mean(dim=0).tolist() == pytest.approx([30, 20], abs=0.2)


def test_a_flipped_or_resized_view_gets_the_same_masks(embeddings):
    """A teacher's mask of three pixels leaves no choice of points.

    In a view three times as large the middle one of each three pixels has the same center.
    """
    chosen = torch.tensor([[36, 25], [44, 33], [40, 30]])

    def refined(scale, flip):
        soft = torch.zeros(1, 64 * scale, 96 * scale)
        for x, y in (chosen * scale + scale // 2).tolist():
            soft[0, y, x] = 0.9
        geometry = frame(64 * scale, 96 * scale, flip)
        item = dict(index=0, geometry=geometry, seed=0)
        pseudo = labels_of(geometry.to_view(soft))
        return geometry.to_view(
            refine.refine(pseudo, embeddings, item, *how("iou", 0.0)).mask_probs
        )

    plain = refined(1, False)
    assert mask_iou(plain[0] > 0.5, embeddings.dataset.mask) > 0.8
    assert torch.allclose(refined(1, True), plain, atol=1e-5)
    # Three times the size: the same, up to the resizing itself.
    for flip in (False, True):
        large = refined(3, flip)
        small = augment.F.resize(large, [64, 96], augment.NEAREST_EXACT)
        assert mask_iou(small[0] > 0.5, plain[0] > 0.5) > 0.98
    assert embeddings.encoded == 1


def test_refined_labels_are_consistent_and_classes_stay(embeddings):
    """Fields fit together: mask = soft > 0.5, box of the mask, quality of the mask."""
    loose = augment.F.gaussian_blur(embeddings.dataset.mask[None].float(), 15, 4.0)
    pseudo = labels_of((0.2 + 0.8 * loose).clamp(max=0.95) * (loose > 0.2))
    before = copy.deepcopy(pseudo)
    item = dict(index=0, geometry=frame(64, 96, False), seed=3)
    made = refine.refine(pseudo, embeddings, item, *how())
    truth = embeddings.dataset.mask
    assert mask_iou(made.masks[0], truth) > mask_iou(before.masks[0], truth) + 0.05
    assert torch.equal(made.masks, made.mask_probs > 0.5)
    assert torch.equal(made.boxes, boxes_of(made.masks))
    assert torch.equal(made.mask_quality, mask_quality(made.mask_probs))
    assert torch.equal(made.labels, before.labels)
    assert torch.equal(made.class_quality, before.class_quality)
    # What was given in stays as it was; the same seed gives the same.
    assert torch.equal(pseudo.masks, before.masks)
    again = refine.refine(pseudo, embeddings, item, *how())
    assert torch.equal(again.mask_probs, made.mask_probs)


def test_mask_iou_by_hand():
    """6 and 4 pixels, 2 of them in common: 2 of 8; the same mask; nothing in common; none."""
    masks = torch.zeros(4, 4, 4, dtype=torch.bool)
    other = masks.clone()
    masks[0, :3, :2], other[0, 2:, :2] = True, True
    masks[1, 1], other[1, 1] = True, True
    masks[2, 0], other[2, 3] = True, True
    assert mask_iou(masks, other).tolist() == [0.25, 1.0, 0.0, 0.0]
    # Each with each, by broadcasting.
    table = mask_iou(masks[:3, None], other[None, :3])
    assert table.shape == (3, 3) and table.diagonal().tolist() == [0.25, 1.0, 0.0]
    assert table[0].tolist() == pytest.approx([0.25, 2 / 8, 0.0])


def test_choice_by_hand():
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, :2] = True
    logits = torch.full((1, 3, 4, 4), -5.0)
    logits[0, 0, :1] = 5  # half of the mask: IoU 0.5
    logits[0, 1, :3] = 5  # two thirds
    logits[0, 2, 2:] = 5  # nothing in common
    expected = torch.tensor([[0.9, 0.7, 0.95]])
    chosen, agreement = refine.choose(logits, expected, masks, "iou")
    assert torch.equal(chosen[0], logits[0, 2]) and agreement.tolist() == [0]
    chosen, agreement = refine.choose(logits, expected, masks, "agreement")
    assert torch.equal(chosen[0], logits[0, 1])
    assert agreement.tolist() == pytest.approx([2 / 3])


def test_unknown_rules_are_errors():
    soft = torch.full((1, 4, 4), 0.9)
    with pytest.raises(ValueError, match="no sampling rule 'codes'"):
        refine.point_weights(labels_of(soft), "codes")
    with pytest.raises(ValueError, match="no rule of choice 'best'"):
        refine.choose(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3), soft > 0.5, "best")


def test_the_gate_and_the_calibration_by_hand():
    """Three instances: SAM agrees by 2/3, by 1/4, and draws nothing at all."""
    soft = torch.zeros(3, 4, 4)
    soft[:, :2] = 0.8
    logits = torch.full((3, 4, 4), -5.0)
    logits[0, :3] = 5
    logits[1, 0, :2] = 5
    agreement = mask_iou(logits > 0, soft > 0.5)

    def made(gate: float, calibrate: bool = False, min_area: int = 0):
        return refine.apply_gate(labels_of(soft), logits, agreement, gate, calibrate, min_area)

    gated = made(0.5)
    assert gated.masks.flatten(1).sum(1).tolist() == [12, 8, 8]
    assert gated.mask_quality.tolist() == pytest.approx([1 / (1 + math.exp(-5)), 0.8, 0.8])
    assert gated.boxes[:, 3].tolist() == [3, 2, 2]
    # Without the gate an empty mask is still none.
    open_gate = made(0.0)
    assert open_gate.masks.flatten(1).sum(1).tolist() == [12, 2, 8]
    # ssis Eq. (calibration): 0.8 times 2/3, 1/4 and 0; and as weights of the mask loss.
    # A mask of no more pixels than the filter asks for is none either.
    few = made(0.0, min_area=2)
    assert few.masks.flatten(1).sum(1).tolist() == [12, 8, 8]
    calibrated = made(0.5, calibrate=True)
    assert calibrated.mask_quality.tolist() == pytest.approx([0.8 * 2 / 3, 0.2, 0])
    weights = calibrated.target(calibrated=True)["mask_weights"]
    assert weights[0].unique().tolist() == pytest.approx([0.8 * 2 / 3])
    both = calibrated.target(uncertainty=True, calibrated=True)["mask_weights"]
    # The teacher's own mask was kept: u of 0.8 is 0.4.
    assert both[1, 0, 0].item() == pytest.approx(0.6 * 0.2)


@pytest.mark.parametrize("rule", ["iou", "agreement"])
def test_nothing_tiny_things_borders_and_whole_images(embeddings, rule):
    soft = torch.zeros(5, 64, 96)
    soft[0, 10, 10] = 0.6  # one pixel
    soft[1, :, 0] = 0.7  # the left border
    soft[2, 63, 90:] = 0.7  # a corner
    soft[3] = 0.95  # the whole image
    soft[4, 20:40, 30:50] = 0.9
    item = dict(index=0, geometry=frame(64, 96, True), seed=0)
    for gate in (0.0, 0.5):
        made = refine.refine(labels_of(soft), embeddings, item, *how(rule, gate))
        assert made.masks.flatten(1).any(dim=1).all()
        width, height = (made.boxes[:, 2:] - made.boxes[:, :2]).unbind(1)
        assert (width > 0).all() and (height > 0).all()
    none = labels_of(soft[:0])
    assert refine.refine(none, embeddings, item, *how()) is none
