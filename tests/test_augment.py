"""Views: the weak one moves masks with pixels, the strong one nothing; ARP's properties."""

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
        view, target, _ = augment.weak_view(image, dict(masks=masks), SETTINGS, seed)
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
    config_ = config.Config(arp="unlabeled", arp_jitter=jitter)
    new_images, new_targets = augment.arp(images, targets, config_, seed)
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


def test_paste_by_hand():
    """4 x 6 pixels; below: two instances, one of which gets hidden; above: one, and dust."""
    below, above = torch.zeros(3, 4, 6), torch.ones(3, 4, 6)
    masks = torch.zeros(2, 4, 6, dtype=torch.uint8)
    masks[0, 0:4, 0:2], masks[1, 1:3, 3:5] = 1, 1
    target = dict(masks=masks, labels=torch.tensor([1, 2]), boxes=augment.data.boxes_of(masks))
    target["mask_weights"] = torch.full((2, 4, 6), 0.4)
    pasted = torch.zeros(2, 4, 6, dtype=torch.uint8)
    pasted[0, 0:3, 1:5], pasted[1, 3, 5] = 1, 1
    source = dict(masks=pasted, labels=torch.tensor([3, 4]), boxes=augment.data.boxes_of(pasted))
    source["mask_weights"] = torch.full((2, 4, 6), 0.6)
    image, made = augment.paste(below, target, above, source, min_area=2 / 24)
    # The dust is too small, the second instance is hidden, the first lost three pixels.
    assert made["labels"].tolist() == [3, 1]
    assert made["masks"].flatten(1).sum(1).tolist() == [12, 5]
    assert made["boxes"].tolist() == [[1, 0, 5, 3], [0, 0, 2, 4]]
    assert torch.equal(image[0], pasted[0].float())
    # Pasted: doubt inside as it was, none around it. Below: none where it is now hidden.
    assert made["mask_weights"][0, 0, 1] == 0.6 and made["mask_weights"][1, 3, 0] == 0.4
    assert made["mask_weights"][1, 0, 1] == 0.4  # as sure as this instance ever is


def test_a_batch_of_one_or_none_is_left_alone():
    image, target = scene(30, 30, 0.5, 2, 0)
    settings = config.Config(arp="unlabeled")
    assert augment.arp([image], [target], settings, 0) == ([image], [target])
    assert augment.arp([], [], settings, 0) == ([], [])
    # Two are a pair, also where one of them has nothing to give.
    empty = {key: value[:0] for key, value in target.items()}
    _, targets = augment.arp([image, image * 0], [target, empty], settings, 0)
    assert len(targets[0]["labels"]) == 2 and len(targets[1]["labels"]) == 2
