"""Views: the weak one moves masks with pixels, the strong one moves nothing."""

import pytest
import torch

from ssis import augment

pytestmark = pytest.mark.fast

SIZE = augment.ViewSize(short_min=24, short_max=64, long_max=80)


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


def test_of_a_much_too_large_image_every_pixel_counts():
    """Stripes of one pixel are gray from afar; two pixels of each row would be chance."""
    stripes = torch.zeros(3, 600, 800, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    small = augment.reduced(stripes, 80)
    assert small.shape == (3, 120, 160) and (small[:, 2:-2, 2:-2].float() - 127.5).abs().max() < 8
    view = augment.resize(stripes, 60, 80)
    assert view.shape == (3, 60, 80) and (view[:, 2:-2, 2:-2].float() - 127.5).abs().max() < 8
    # Up to four times too large, as in all recorded runs, nothing changes.
    for side in (320, 80, 20):
        image = torch.randint(0, 256, (3, side - 8, side), dtype=torch.uint8)
        assert augment.reduced(image, 80) is image
    assert augment.reduced(torch.zeros(3, 10, 321), 80).shape == (3, 16, 160)


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
        size = tuple(view.shape[1:])
        assert geometry == augment.Geometry((32, 48), size, (0, 0), size, mirrored)
        torch.manual_seed(seed + 100)
        again, _, same = augment.weak_view(image, None, SIZE, seed)
        assert torch.equal(again, view) and same == geometry
        flips.add(mirrored)
    assert flips == {False, True}


CROP = augment.ViewSize(24, 64, 80, crop=(40, 60), scale=(0.4, 3.0))


def test_a_crop_is_cut_from_the_resized_image_and_its_geometry_leads_back():
    """Large-scale jitter, smaller and larger than the crop, with and without a flip.

    Masks: of the original, resized whole and taken to the view, they are the view's. Pixels: a
    ramp of the original's coordinates says where each pixel of the view comes from.
    """
    y, x = torch.meshgrid(torch.arange(90) + 0.5, torch.arange(120) + 0.5, indexing="ij")
    image = torch.stack([x * 2, y * 2, x * 0]).to(torch.uint8)
    masks = torch.zeros(2, 90, 120, dtype=torch.uint8)
    masks[0, 30:70, 20:100], masks[1, 10:20, 5:15] = 1, 1
    seen = set()
    for seed in range(60):
        target = dict(masks=masks, labels=torch.tensor([1, 2]))
        view, made, geometry = augment.weak_view(image, target, CROP, seed)
        height, width = geometry.view
        assert view.shape[1:] == made["masks"].shape[1:] == (height, width)
        assert height <= 40 and width <= 60
        # 53 x 40 fit into 60 x 40: the scale is that of the height.
        s = geometry.scaled[0] / 40
        assert 0.39 < s < 3.01 and geometry.scaled[1] == pytest.approx(s * 160 / 3, abs=1)
        for side, crop, whole, first in zip(
            geometry.view, CROP.crop, geometry.scaled, geometry.offset, strict=True
        ):
            assert side == min(crop, whole) and 0 <= first <= whole - side
        whole = augment.resize_masks(masks, torch.zeros(3, *geometry.scaled))
        assert torch.equal(geometry.to_view(whole), made["masks"])
        # There: what a pixel shows is where `to_original` says it is from.
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        points = torch.stack([columns, rows], dim=2) + 0.5
        found = geometry.to_original(points)
        shown = view[:2].permute(1, 2, 0) * 255 / 2
        near = 1.5 + 1 / s
        assert (found - shown).abs().max() < near
        # And back.
        y_back, x_back = geometry.from_original(found[:, 0, 1] / 90, found[0, :, 0] / 120)
        torch.testing.assert_close(y_back, points[:, 0, 1], atol=1e-3, rtol=0)
        torch.testing.assert_close(x_back, points[0, :, 0], atol=1e-3, rtol=0)
        seen.add((geometry.flip, s > 1, geometry.offset == (0, 0)))
    assert all(len({key[k] for key in seen}) == 2 for k in range(3))
    # The same seed, the same view; another one, another.
    again = augment.weak_view(image, None, CROP, 59)
    assert again[2] == geometry and torch.equal(again[0], view)


def test_points_of_a_cropped_view_by_hand():
    """Twice the size, cut 10 below and 20 to the right of the corner; and its mirror image."""
    points = torch.tensor([[0.0, 0.0], [3.0, 5.0]])
    geometry = augment.Geometry((64, 96), (128, 192), (10, 20), (40, 60), False)
    assert geometry.to_original(points).tolist() == [[10.0, 5.0], [11.5, 7.5]]
    mirrored = geometry._replace(flip=True)
    assert mirrored.to_original(points).tolist() == [[40.0, 5.0], [38.5, 7.5]]


def test_scale_and_jitter_of_a_cropped_view_are_drawn_apart():
    """The strong view's first draw says whether colors are jittered: 4 of 5, at any scale."""
    gray = torch.full((3, 40, 60), 128, dtype=torch.uint8)
    small, large = [], []
    for seed in range(400):
        view, _, geometry = augment.weak_view(gray, None, CROP, seed)
        jittered = not torch.allclose(augment.strong_view(view, seed), view, atol=1e-3)
        (large if geometry.scaled[0] > 80 else small).append(jittered)
    assert len(small) > 80 and len(large) > 80
    assert abs(sum(small) / len(small) - sum(large) / len(large)) < 0.15


def test_the_constants_are_the_released_ones():
    """GD's strong view, PL-DC's erased boxes, and SSD's distortion as Cityscapes has it."""
    jitter, gray, blur = augment.STRONG.transforms
    inner = jitter.transforms[0]
    assert (jitter.p, gray.p, blur.p) == (0.8, 0.2, 0.5)
    assert inner.brightness == inner.contrast == inner.saturation == (0.6, 1.4)
    assert inner.hue == (-0.1, 0.1) and list(blur.transforms[0].sigma) == [0.1, 2.0]
    erased = [(t.p, *t.scale, *t.ratio) for t in augment.ERASING.transforms]
    assert erased == [
        (0.7, 0.05, 0.2, 0.3, 3.3), (0.5, 0.02, 0.2, 0.1, 6), (0.3, 0.02, 0.2, 0.05, 8)
    ]  # fmt: skip
    parts = [t.transforms[0] for t in augment.DISTORT.transforms]
    assert all(t.p == 0.5 for t in augment.DISTORT.transforms)
    assert parts[0].brightness == (0.875, 1.125)
    assert parts[1].contrast == parts[2].saturation == (0.5, 1.5)
    # 18 of OpenCV's 180 degrees.
    assert parts[3].hue == (-0.1, 0.1)


def test_cityscapes_short_sides_follow_from_the_crop():
    """1 to 4 times what fits of 1024 x 2048 into 512 x 1024 is a short side of 512 to 2048."""
    size = augment.ViewSize(1024, 1024, 2048, crop=(512, 1024), scale=(1.0, 4.0))
    made = [
        augment.draw_geometry((1024, 2048), size, torch.Generator().manual_seed(seed))
        for seed in range(200)
    ]
    short = [geometry.scaled[0] for geometry in made]
    assert 512 <= min(short) < 540 and 2020 < max(short) <= 2048
    assert all(geometry.view == (512, 1024) for geometry in made)


def test_distorted_colors_are_in_the_view_itself_and_follow_its_seed():
    image = (torch.rand(3, 40, 50) * 255).to(torch.uint8)
    plain, colored = augment.ViewSize(40, 40, 60), augment.ViewSize(40, 40, 60, color=True)
    state = torch.get_rng_state()
    differ = 0
    for seed in range(12):
        before, _, geometry = augment.weak_view(image, None, plain, seed)
        view, _, same = augment.weak_view(image, None, colored, seed)
        assert same == geometry and 0 <= view.min() and view.max() <= 1
        assert torch.equal(view, augment.weak_view(image, None, colored, seed)[0])
        differ += not torch.equal(view, before)
    assert differ > 8 and torch.equal(state, torch.get_rng_state())


def test_the_colors_of_the_two_views_are_drawn_apart(monkeypatch):
    """Where the weak view is brightened the strong one's jitter is still applied in 0.8."""
    for name in ("DISTORT", "STRONG"):
        first = augment.v2.Compose(getattr(augment, name).transforms[:1])
        monkeypatch.setattr(augment, name, first)
    image = (torch.rand(3, 16, 16) * 255).to(torch.uint8)
    plain, colored = augment.ViewSize(16, 16, 16), augment.ViewSize(16, 16, 16, color=True)
    both = []
    for seed in range(0, 3000, 10):
        view = augment.weak_view(image, None, colored, seed)[0]
        if not torch.equal(view, augment.weak_view(image, None, plain, seed)[0]):
            both.append(not torch.equal(augment.strong_view(view, seed), view))
    assert 120 < len(both) < 180 and sum(both) / len(both) == pytest.approx(0.8, abs=0.1)


def test_erasing_fills_boxes_with_noise_and_leaves_the_rest_as_it_was():
    image = torch.full((3, 60, 60), 0.5)
    erased = []
    for seed in range(40):
        plain = augment.strong_view(image, seed)
        view = augment.strong_view(image, seed, erasing=True)
        assert 0 <= view.min() and view.max() <= 1
        erased.append((view != plain).any(dim=0).float().mean().item())
    # None of the three boxes in 0.3 x 0.5 x 0.7 of all views; their areas by PL-DC's ranges.
    assert 0 < sum(share == 0 for share in erased) < 12
    assert max(erased) < 0.6 and sum(erased) / 40 == pytest.approx(0.16, abs=0.07)


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


def test_without_flips_no_view_is_mirrored_and_nothing_else_changes():
    image = torch.rand(3, 32, 48).mul(255).to(torch.uint8)
    for size in (SIZE, CROP):
        for seed in range(12):
            view, _, geometry = augment.weak_view(image, None, size, seed)
            plain, _, kept = augment.weak_view(image, None, size._replace(flip=False), seed)
            assert not kept.flip and kept == geometry._replace(flip=False)
            if not geometry.flip:
                assert torch.equal(plain, view)
