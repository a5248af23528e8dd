"""Views: the weak one moves masks with pixels, the strong one nothing; ARP's properties."""

import pytest
import torch

from ssis import augment, data

pytestmark = pytest.mark.fast
SIZE = data.ViewSize(short_min=24, short_max=64, long_max=80)
# Smallest mask that is pasted: S4M's fraction of an image.
MIN_AREA = 0.00286


def test_masks_follow_the_pixels_in_the_weak_view():
    masks = torch.zeros(2, 32, 48, dtype=torch.uint8)
    masks[0, 4:20, 6:20] = 1
    masks[1, 22:30, 30:44] = 1
    # The image shows the masks themselves, so that it must agree with them afterwards.
    image = torch.stack([masks[0] * 255, masks[1] * 255, torch.zeros_like(masks[0])])
    flips, sizes = 0, set()
    for seed in range(20):
        view, target, _ = augment.weak_view(image, dict(masks=masks), SIZE, seed)
        assert view.dtype == torch.float32 and 0 <= view.min() and view.max() <= 1
        assert min(view.shape[1:]) <= 64 and max(view.shape[1:]) <= 80
        assert set(target["masks"].unique().tolist()) == {0, 1}
        sizes.add(tuple(view.shape))
        center = target["masks"][0].float().sum(0)
        flips += bool(center[: len(center) // 2].sum() < center[len(center) // 2 :].sum())
        for channel in range(2):
            shown, mask = view[channel] > 0.5, target["masks"][channel].bool()
            overlap = (shown & mask).sum() / (shown | mask).sum()
            assert overlap > 0.85
    assert len(sizes) > 5 and 3 < flips < 17


def test_a_weak_view_follows_its_seed_and_its_geometry_says_what_was_done():
    """An image that is bright on the left: the bright side says whether it is mirrored."""
    image = torch.zeros(3, 32, 48, dtype=torch.uint8)
    image[:, :, :24] = 255
    flips = set()
    for seed in range(12):
        state = torch.get_rng_state()
        view, target, geometry = augment.weak_view(image, None, SIZE, seed)
        assert target is None and torch.equal(state, torch.get_rng_state())
        mirrored = bool(view[:, :, 0].mean() < 0.5)
        assert geometry == augment.Geometry((32, 48), tuple(view.shape[1:]), mirrored)
        torch.manual_seed(seed + 100)
        again, _, same = augment.weak_view(image, None, SIZE, seed)
        assert torch.equal(again, view) and same == geometry
        flips.add(mirrored)
    assert flips == {False, True}


def test_the_long_side_is_limited():
    assert augment.resize(torch.zeros(3, 30, 100), 64, 80).shape == (3, 24, 80)
    # A strip stays wide enough for the blur of the strong view.
    assert augment.resize(torch.zeros(3, 4, 400), 64, 80).shape == (3, 16, 80)
    assert augment.resize(torch.zeros(3, 100, 50), 25, 80).shape == (3, 50, 25)


def test_the_strong_view_leaves_every_pixel_in_its_place():
    """An edge stays where it is, for any draw of color, gray and blur."""
    image = torch.full((3, 40, 40), 0.2)
    image[:, :, 20:] = 0.8
    differ = 0
    for seed in range(30):
        view = augment.strong_view(image, seed)
        assert view.shape == image.shape and 0 <= view.min() and view.max() <= 1
        step = (view[:, :, 1:] - view[:, :, :-1]).abs().sum(dim=(0, 1))
        assert step.argmax() == 19
        differ += not torch.allclose(view, image, atol=1e-3)
    assert differ > 20


def test_the_strong_view_follows_its_seed_and_spares_the_global_generator():
    image = torch.rand(3, 24, 24)
    state = torch.get_rng_state()
    assert torch.equal(augment.strong_view(image, 4), augment.strong_view(image, 4))
    assert torch.equal(state, torch.get_rng_state())
    views = [augment.strong_view(image, seed) for seed in range(6)]
    assert len({view.sum().item() for view in views}) > 3


def scene(height: int, width: int, shade: float, n: int, seed: int) -> tuple:
    """An image of one shade whose instances, overlapping, are each a little brighter."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.full((3, height, width), shade)
    masks = torch.zeros(n, height, width, dtype=torch.uint8)
    for k in range(n):
        y, x = (torch.rand(2, generator=generator) * torch.tensor([height, width]) * 0.7).int()
        masks[k, y : y + height // 3, x : x + width // 3] = 1
        image[:, masks[k].bool()] = shade + 0.02 * (k + 1)
    labels = torch.arange(n) % 3 + 1
    boxes = augment.data.boxes_of(masks)
    weights = torch.full((n, height, width), 0.5)
    return image, dict(boxes=boxes, labels=labels, masks=masks, mask_weights=weights)


@pytest.mark.parametrize("jitter", [0.0, 0.2])
@pytest.mark.parametrize("seed", range(8))
def test_pasted_images_are_consistent(seed, jitter):
    """No pixel has two owners, none comes from elsewhere, nothing degenerate survives."""
    sizes = [(40, 60), (64, 48), (50, 50), (40, 60), (30, 90), (64, 64), (40, 40), (80, 40)]
    made = [scene(*size, k / 10, k % 4 + 1, 10 * seed + k) for k, size in enumerate(sizes)]
    images, targets = (list(part) for part in zip(*made, strict=True))
    before = [image.clone() for image in images], [t["masks"].clone() for t in targets]
    new_images, new_targets = augment.arp(images, targets, MIN_AREA, jitter, seed)
    # What was given in is as it was.
    assert all(torch.equal(a, b) for a, b in zip(images, before[0], strict=True))
    assert all(torch.equal(t["masks"], m) for t, m in zip(targets, before[1], strict=True))
    changed = [k for k in range(8) if new_targets[k] is not targets[k]]
    # max(1, 8 // 4) pairs, in both directions.
    assert len(changed) == 4
    shades = torch.arange(8) / 10
    for k in changed:
        image, target = new_images[k], new_targets[k]
        assert image.shape == images[k].shape
        assert target["masks"].shape[1:] == image.shape[1:]
        assert target["masks"].sum(0).max() <= 1
        assert target["masks"].flatten(1).any(1).all()
        assert torch.equal(target["boxes"], augment.data.boxes_of(target["masks"]))
        assert len(target["labels"]) == len(target["masks"]) == len(target["mask_weights"])
        # The shade tells where a pixel comes from: its tenth is the number of its image.
        source = (image[0, None] - shades[:, None, None] + 1e-4).clamp(min=-1)
        source = torch.where(source < -1e-3, 9.0, source).argmin(0)
        sources = set(source.unique().tolist())
        assert sources <= set(changed) and k in sources and len(sources) <= 2
        # And every pixel that came from the other image belongs to a pasted instance.
        foreign = source != k
        owned = target["masks"].bool().any(0)
        assert not (foreign & ~owned).float().mean() > 0.01


def rectangles(height: int, width: int, *places) -> dict:
    """A target of rectangles: (top, bottom, left, right) each; weights that all differ."""
    masks = torch.zeros(len(places), height, width, dtype=torch.uint8)
    for mask, (top, bottom, left, right) in zip(masks, places, strict=True):
        mask[top:bottom, left:right] = 1
    return dict(
        masks=masks,
        labels=torch.arange(len(places)) + 1,
        boxes=augment.data.boxes_of(masks),
        mask_weights=torch.rand(masks.shape) * 0.9,
    )


def test_paste_by_hand():
    """Below: a bar that loses some pixels, one that is hidden but for a twentieth; dust."""
    below, above = torch.rand(3, 20, 30), torch.rand(3, 20, 30)
    target = rectangles(20, 30, (0, 20, 0, 4), (5, 15, 10, 20))
    source = rectangles(20, 30, (3, 18, 2, 20), (19, 20, 29, 30))
    source["labels"] += 2
    # One row of the second bar is left to see: 10 x 1 of 100 pixels would be a tenth.
    source["masks"][0, 14, 10:15] = 0
    image, made = augment.paste(below, target, above, source, min_area=2 / 600)
    pasted = source["masks"][0].bool()
    assert made["labels"].tolist() == [3, 1]
    assert torch.equal(made["masks"][0].bool(), pasted)
    assert torch.equal(made["masks"][1].bool(), target["masks"][0].bool() & ~pasted)
    assert made["boxes"].tolist() == [[2, 3, 20, 18], [0, 0, 4, 20]]
    # Every pasted pixel is the source's, every other one as it was.
    assert torch.equal(image[:, pasted], above[:, pasted])
    assert torch.equal(image[:, ~pasted], below[:, ~pasted])
    # Pasted: doubt inside as it was; around it the most sure that this mask is anywhere.
    own, other = source["mask_weights"][0], target["mask_weights"][0]
    assert torch.equal(made["mask_weights"][0][pasted], own[pasted])
    assert (made["mask_weights"][0][~pasted] == own.max()).all()
    # Below: the other way round.
    assert torch.equal(made["mask_weights"][1][~pasted], other[~pasted])
    assert (made["mask_weights"][1][pasted] == other.max()).all()
    # A tenth of the second bar is enough.
    source["masks"][0, 14, 10:20] = 0
    assert augment.paste(below, target, above, source, 2 / 600)[1]["labels"].tolist() == [3, 1, 2]


@pytest.mark.parametrize("scale", [0.8, 1.0, 1.2])
def test_what_is_pasted_is_scaled_about_the_middle(scale):
    image = torch.rand(3, 40, 60)
    target = rectangles(40, 60, (15, 25, 20, 40))
    moved, made = augment.place(image, target, torch.zeros(3, 50, 60), scale)
    assert moved.shape == (3, 50, 60) and made["masks"].shape == (1, 50, 60)
    assert made["masks"].sum().item() == pytest.approx(200 * scale**2, rel=0.02)
    y, x = torch.where(made["masks"][0] > 0)
    assert (y.float().mean() + 0.5).item() == pytest.approx(25, abs=0.51)
    assert (x.float().mean() + 0.5).item() == pytest.approx(30, abs=0.51)
    if scale == 1:
        assert torch.equal(moved[:, 5:45], image) and moved[:, :5].sum() == 0


def test_a_batch_of_one_or_none_is_left_alone():
    image, target = scene(30, 30, 0.5, 2, 0)
    assert augment.arp([image], [target], MIN_AREA, 0.0, 0) == ([image], [target])
    assert augment.arp([], [], MIN_AREA, 0.0, 0) == ([], [])
    # Two are a pair, also where one of them has nothing to give.
    empty = {key: value[:0] for key, value in target.items()}
    _, targets = augment.arp([image, image * 0], [target, empty], MIN_AREA, 0.0, 0)
    assert len(targets[0]["labels"]) == 2 and len(targets[1]["labels"]) == 2


def test_both_of_a_pair_get_the_other_as_it_was():
    """Two overlapping instances: each is in front in the other's image, neither comes back."""
    images = [torch.full((3, 30, 30), 0.25), torch.full((3, 30, 30), 0.75)]
    targets = [rectangles(30, 30, (5, 20, 5, 20)), rectangles(30, 30, (10, 25, 10, 25))]
    targets[1]["labels"] += 1
    new_images, new_targets = augment.arp(images, targets, MIN_AREA, 0.0, 0)
    for k, other in ((0, 1), (1, 0)):
        above, below = targets[other]["masks"][0].bool(), targets[k]["masks"][0].bool()
        assert new_targets[k]["labels"].tolist() == [other + 1, k + 1]
        assert torch.equal(new_targets[k]["masks"].bool(), torch.stack([above, below & ~above]))
        assert torch.equal(new_images[k][0] == images[other][0, 0, 0], above)


def test_pairs_and_scales_are_drawn_anew_from_each_seed(monkeypatch):
    images, targets = zip(*(scene(40, 40, k / 10, 2, k) for k in range(6)), strict=True)
    drawn, scales, before = set(), [], augment.place

    def spy(image, target, like, scale):
        scales.append(scale)
        return before(image, target, like, scale)

    monkeypatch.setattr(augment, "place", spy)
    for seed in range(10):
        for _ in range(2):
            torch.manual_seed(len(scales))
            _, made = augment.arp(list(images), list(targets), MIN_AREA, 0.2, seed)
            drawn.add((seed, tuple(k for k in range(6) if made[k] is not targets[k])))
    # One pair of six images, the same whenever the seed is; five of ten pairs must differ.
    assert len(drawn) == 10 and len({pair for _, pair in drawn}) > 4
    assert min(scales) >= 0.8 and max(scales) <= 1.2 and max(scales) - min(scales) > 0.2
