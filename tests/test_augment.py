"""Views: the weak one moves masks with pixels, the strong one moves nothing."""

import pytest
import torch

from ssis import augment, config

pytestmark = pytest.mark.fast
SETTINGS = config.Config(short_side_min=24, short_side=64, long_side=80)


def test_masks_follow_the_pixels_in_the_weak_view():
    masks = torch.zeros(2, 32, 48, dtype=torch.uint8)
    masks[0, 4:20, 6:20] = 1
    masks[1, 22:30, 30:44] = 1
    # The image shows the masks themselves, so that it must agree with them afterwards.
    image = torch.stack([masks[0] * 255, masks[1] * 255, torch.zeros_like(masks[0])])
    flips, sizes = 0, set()
    for seed in range(20):
        view, target = augment.weak_view(image, dict(masks=masks), SETTINGS, seed)
        assert view.dtype == torch.float32 and 0 <= view.min() and view.max() <= 1
        assert min(view.shape[1:]) <= 64 and max(view.shape[1:]) <= 80
        assert set(target["masks"].unique().tolist()) == {0, 1}
        sizes.add(tuple(view.shape))
        centre = target["masks"][0].float().sum(0)
        flips += bool(centre[: len(centre) // 2].sum() < centre[len(centre) // 2 :].sum())
        for channel in range(2):
            shown, mask = view[channel] > 0.5, target["masks"][channel].bool()
            overlap = (shown & mask).sum() / (shown | mask).sum()
            assert overlap > 0.85
    assert len(sizes) > 5 and 3 < flips < 17


def test_the_long_side_is_limited():
    assert augment.resize(torch.zeros(3, 30, 100), 64, 80).shape == (3, 24, 80)
    # A strip stays wide enough for the blur of the strong view.
    assert augment.resize(torch.zeros(3, 4, 400), 64, 80).shape == (3, 16, 80)
    assert augment.resize(torch.zeros(3, 100, 50), 25, 80).shape == (3, 50, 25)


def test_the_strong_view_leaves_every_pixel_in_its_place():
    """An edge stays where it is, for any draw of colour, gray and blur."""
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
