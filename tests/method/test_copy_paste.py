"""S4M's copy-paste: by hand, against a loop, and as properties."""

import pytest
import torch

from ssis import copy_paste
from ssis.targets import boxes_of, instances

pytestmark = pytest.mark.fast


# Smallest mask that is pasted: S4M's fraction of an image.
MIN_AREA = 0.00286


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
    boxes = boxes_of(masks)
    weights = torch.full((n, height, width), 0.5)
    return image, dict(boxes=boxes, labels=labels, masks=masks, mask_weights=weights)


@pytest.mark.parametrize("jitter", [0.0, 0.2])
@pytest.mark.parametrize("seed", range(8))
def test_pasted_images_are_consistent(seed, jitter):
    """No pixel comes from elsewhere or has owners of both images; nothing is degenerate."""
    sizes = [(40, 60), (64, 48), (50, 50), (40, 60), (30, 90), (64, 64), (40, 40), (80, 40)]
    made = [scene(*size, k / 10, k % 4 + 1, 10 * seed + k) for k, size in enumerate(sizes)]
    images, targets = (list(part) for part in zip(*made, strict=True))
    before = [image.clone() for image in images], [t["masks"].clone() for t in targets]
    new_images, new_targets = copy_paste.arp(images, targets, MIN_AREA, jitter, seed)
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
        assert target["masks"].flatten(1).any(1).all()
        assert torch.equal(target["boxes"], boxes_of(target["masks"]))
        assert len(target["labels"]) == len(target["masks"]) == len(target["mask_weights"])
        # The shade tells where a pixel comes from: its tenth is the number of its image.
        source = (image[0, None] - shades[:, None, None] + 1e-4).clamp(min=-1)
        source = torch.where(source < -1e-3, 9.0, source).argmin(0)
        sources = set(source.unique().tolist())
        assert sources <= set(changed) and k in sources and len(sources) <= 2
        # And every pixel that came from the other image belongs to a pasted instance.
        foreign = source != k
        owned = target["masks"].bool().any(0)
        assert not (foreign & ~owned).any()
        # What is pasted hides what was there. Moved, its instances hide each other too.
        masks = target["masks"].bool()
        in_front = torch.stack([foreign[mask].all() for mask in masks])
        assert not (masks[in_front].any(0) & masks[~in_front].any(0)).any()
        assert not jitter or masks[in_front].sum(0).max() <= 1


def rectangles(height: int, width: int, *places) -> dict:
    """A target of rectangles: (top, bottom, left, right) each; weights that all differ."""
    masks = torch.zeros(len(places), height, width, dtype=torch.uint8)
    for mask, (top, bottom, left, right) in zip(masks, places, strict=True):
        mask[top:bottom, left:right] = 1
    return dict(
        masks=masks,
        labels=torch.arange(len(places)) + 1,
        boxes=boxes_of(masks),
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
    source = copy_paste.largest(source, 2)
    image, made = copy_paste.paste(below, target, above, source)
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
    assert copy_paste.paste(below, target, above, source)[1]["labels"].tolist() == [3, 1, 2]


def test_what_lies_in_another_instance_stays_there():
    """A button on a shirt, in both images: only what is pasted over it hides it."""
    image = torch.rand(3, 20, 40)
    shirt, button = (0, 20, 0, 18), (8, 12, 8, 12)
    target = rectangles(20, 40, shirt, button, (2, 18, 30, 40))
    source = rectangles(20, 40, (0, 20, 20, 36), (8, 12, 24, 28))
    _, made = copy_paste.paste(image, target, image, source)
    assert made["labels"].tolist() == [1, 2, 1, 2, 3]
    assert torch.equal(made["masks"][:2], source["masks"])
    assert torch.equal(made["masks"][2:4], target["masks"][:2])
    assert made["boxes"][4].tolist() == [36, 2, 40, 18]
    # Scattered, each at a place of its own, the first lies in front of the second.
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        _, moved = copy_paste.scatter(image, source, (20, 40), 0.2, generator)
        assert moved["masks"].sum(0).max() == 1 and moved["masks"][0].sum() > 200


def test_without_jitter_an_image_lies_in_the_middle_of_the_other():
    image = torch.rand(3, 40, 60)
    target = rectangles(40, 60, (15, 25, 20, 40))
    moved, made = copy_paste.place(image, target, (50, 50))
    assert torch.equal(moved[:, 5:45], image[:, :, 5:55])
    assert moved[:, :5].sum() == 0 and moved[:, 45:].sum() == 0
    assert made["masks"].sum() == 200 and made["masks"][0, 20:30, 15:35].all()


def scattered_by_loop(image, target, frame, jitter, generator):
    """S4M on COCO, written down pixel by pixel for rectangles that are of one shade."""
    canvas, masks = torch.zeros(3, *frame), torch.zeros(len(target["labels"]), *frame)
    for k in reversed(range(len(target["labels"]))):
        rows, columns = torch.where(target["masks"][k] > 0)
        height, width = (int(p.max() - p.min()) + 1 for p in (rows, columns))
        scale, down, across = torch.rand(3, generator=generator).tolist()
        scale = 1 + jitter * (2 * scale - 1)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        top = int(down * (max(0, frame[0] - height) + 1))
        left = int(across * (max(0, frame[1] - width) + 1))
        for y in range(frame[0]):
            for x in range(frame[1]):
                if top <= y < top + height and left <= x < left + width:
                    canvas[:, y, x] = image[:, rows[0], columns[0]]
                    masks[k, y, x] = 1
    hidden = [(masks[k] > 0) & (masks[:k].sum(0) > 0) for k in range(len(masks))]
    for mask, behind in zip(masks, hidden, strict=True):
        size = mask.sum()
        mask[behind] = 0
        mask *= mask.sum() >= 0.1 * size
    return canvas, masks


@pytest.mark.parametrize("seed", range(4))
def test_with_jitter_each_instance_has_a_scale_and_a_place_of_its_own(seed):
    """Against the loop; one instance is higher than the frame, and is cut."""
    places = [(2, 10, 3, 9), (0, 36, 20, 24), (20, 30, 2, 16), (5, 6, 30, 31)]
    target = rectangles(36, 34, *places)
    image = torch.zeros(3, 36, 34)
    for k, (top, bottom, left, right) in enumerate(places):
        image[:, top:bottom, left:right] = (k + 1) / 8
        target["mask_weights"][k, top:bottom, left:right] = (k + 1) / 10
    made = copy_paste.scatter(image, target, (30, 40), 0.2, torch.Generator().manual_seed(seed))
    wanted = scattered_by_loop(image, target, (30, 40), 0.2, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(made[0], wanted[0])
    assert torch.equal(made[1]["masks"].float(), wanted[1])
    assert made[1]["labels"].tolist() == [1, 2, 3, 4]
    # The weights moved along with the masks.
    for k, (mask, weights) in enumerate(zip(wanted[1], made[1]["mask_weights"], strict=True)):
        if mask.any():
            assert weights[mask > 0].mean().item() == pytest.approx((k + 1) / 10, abs=1e-4)
        # Elsewhere the instance certainly is not: its largest weight, cut off or not.
        hidden = wanted[1][:k].sum(0) > 0
        assert (weights[(mask == 0) & ~hidden] == target["mask_weights"][k].max()).all()
    areas = made[1]["masks"].flatten(1).sum(1).tolist()
    assert 48 * 0.6 < areas[0] < 48 * 1.5 and areas[1] <= 30 * 5


def test_the_pixels_that_are_pasted_are_those_of_the_resized_box():
    """Two L-shaped instances of a noisy image: their pixels, masks, boxes, and nothing else."""
    image, below = torch.rand(3, 40, 40), torch.full((3, 50, 60), 2.0)
    target = rectangles(40, 40, (2, 14, 3, 13), (20, 38, 10, 30))
    target["masks"][0, 2:7, 8:13] = target["masks"][1, 20:30, 20:30] = 0
    empty = {k: v[:0] for k, v in rectangles(50, 60, (0, 5, 0, 5)).items()}
    whole = 0
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        moved = copy_paste.scatter(image, target, (50, 60), 0.2, generator)
        made, labels = copy_paste.paste(below, empty, *moved)
        assert torch.equal((made != 2).any(dim=0), labels["masks"].bool().any(dim=0))
        assert torch.equal(labels["boxes"], boxes_of(labels["masks"]))
        assert labels["masks"].sum(dim=0).max() == 1
        # The first instance is in front, so all of it is there. `scatter` places the last one
        # first: from the same seed the second alone gets the same place.
        last = instances(target, torch.tensor([False, True]))
        generator = torch.Generator().manual_seed(seed)
        alone = copy_paste.scatter(image, last, (50, 60), 0.2, generator)[1]
        for k in range(2 if torch.equal(alone["masks"], labels["masks"][1:]) else 1):
            left, top, right, bottom = labels["boxes"][k].int().tolist()
            x, y, x_end, y_end = target["boxes"][k].int().tolist()
            cut = (slice(None), slice(y, y_end), slice(x, x_end))
            size = [bottom - top, right - left]
            wanted = copy_paste.F.resize(image[cut], size, antialias=False)
            own = copy_paste.F.resize(
                target["masks"][k, None][cut], size, copy_paste.NEAREST_EXACT
            )[0]
            assert torch.equal(labels["masks"][k, top:bottom, left:right], own)
            shown = made[:, top:bottom, left:right]
            assert torch.equal(shown[:, own.bool()], wanted[:, own.bool()])
            whole += 1
    assert whole > 15


def test_a_small_view_is_filled_up_to_the_crop_before_an_instance_is_scattered():
    """A square of 30 x 30 pixels beside a view of 20 x 24: it must not cover all there is."""
    small, large = torch.zeros(3, 20, 24), torch.ones(3, 60, 60)
    targets = [rectangles(20, 24, (2, 18, 2, 20)), rectangles(60, 60, (10, 40, 10, 40))]
    targets[1]["labels"] += 1
    survived = 0
    for seed in range(10):
        images, made = copy_paste.arp([small, large], targets, 0.1, 0.2, seed, (60, 60))
        assert images[0].shape == images[1].shape == (3, 60, 60)
        # Gray where the view ended and nothing was pasted.
        free = ~made[0]["masks"].bool().any(dim=0)
        assert (images[0][:, 20:][:, free[20:]] == 0.5).all()
        assert torch.equal(made[0]["boxes"], boxes_of(made[0]["masks"]))
        assert made[0]["mask_weights"].shape == made[0]["masks"].shape
        survived += 1 in made[0]["labels"].tolist()
    assert survived > 5
    # Without a crop, and without jitter, views keep their sizes.
    images, _ = copy_paste.arp([small, large], targets, 0.1, 0.2, 0)
    assert images[0].shape == small.shape
    images, _ = copy_paste.arp([small, large], targets, 0.1, 0.0, 0, (60, 60))
    assert images[0].shape == small.shape


def test_only_large_instances_are_pasted_and_they_are_measured_before_they_are_scaled():
    images = [torch.zeros(3, 40, 40), torch.ones(3, 40, 40)]
    empty = {k: v[:0] for k, v in rectangles(40, 40, (0, 5, 0, 5)).items()}
    source = rectangles(40, 40, (0, 10, 0, 10), (20, 29, 20, 31), (30, 40, 0, 9))
    for jitter in (0.0, 0.2):
        for seed in range(4):
            # 100, 99 and 90 of 1,600 pixels; a threshold of 99.
            _, made = copy_paste.arp(images, [empty, source], 99 / 1600, jitter, seed)
            assert sorted(made[0]["labels"].tolist()) == [1, 2] or len(made[0]["labels"]) == 1


def test_a_batch_of_one_or_none_is_left_alone():
    image, target = scene(30, 30, 0.5, 2, 0)
    assert copy_paste.arp([image], [target], MIN_AREA, 0.0, 0) == ([image], [target])
    assert copy_paste.arp([], [], MIN_AREA, 0.0, 0) == ([], [])
    # Two are a pair, also where one of them has nothing to give.
    empty = {key: value[:0] for key, value in target.items()}
    _, targets = copy_paste.arp([image, image * 0], [target, empty], MIN_AREA, 0.0, 0)
    assert len(targets[0]["labels"]) == 2 and len(targets[1]["labels"]) == 2


def test_both_of_a_pair_get_the_other_as_it_was():
    """Two overlapping instances: each is in front in the other's image, neither comes back."""
    images = [torch.full((3, 30, 30), 0.25), torch.full((3, 30, 30), 0.75)]
    targets = [rectangles(30, 30, (5, 20, 5, 20)), rectangles(30, 30, (10, 25, 10, 25))]
    targets[1]["labels"] += 1
    new_images, new_targets = copy_paste.arp(images, targets, MIN_AREA, 0.0, 0)
    for k, other in ((0, 1), (1, 0)):
        above, below = targets[other]["masks"][0].bool(), targets[k]["masks"][0].bool()
        assert new_targets[k]["labels"].tolist() == [other + 1, k + 1]
        assert torch.equal(new_targets[k]["masks"].bool(), torch.stack([above, below & ~above]))
        assert torch.equal(new_images[k][0] == images[other][0, 0, 0], above)


def test_pairs_and_places_are_drawn_anew_from_each_seed():
    images, targets = zip(*(scene(40, 40, k / 10, 2, k) for k in range(6)), strict=True)
    drawn, moved = set(), set()
    for seed in range(10):
        for again in range(2):
            torch.manual_seed(again)
            _, made = copy_paste.arp(list(images), list(targets), MIN_AREA, 0.2, seed)
            pair = tuple(k for k in range(6) if made[k] is not targets[k])
            drawn.add((seed, pair))
            moved.add((seed, str([made[k]["boxes"].tolist() for k in pair])))
    # One pair of six images, the same whenever the seed is; five of ten pairs must differ.
    assert len(drawn) == len(moved) == 10 and len({pair for _, pair in drawn}) > 4
