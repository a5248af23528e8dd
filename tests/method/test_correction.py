"""PL-DC's category level: the fading weight and the mixing by hand, prototypes.

The prototypes are tried on what they are for: shapes whose class a (random) network does not
know. CLIP is in test_clip.py.
"""

import math

import pytest
import torch
from conftest import made_labels

from ssis import augment, correction, inference, networks, prototypes, teacher
from ssis.datasets.coco_json import load_coco
from ssis import data

pytestmark = pytest.mark.fast


def test_the_weight_falls_from_one_half_to_nothing_along_a_cosine():
    assert correction.weight(0, 100, 500) == correction.weight(100, 100, 500) == 0.5
    assert correction.weight(300, 100, 500) == pytest.approx(0.25)
    assert correction.weight(200, 100, 500) == pytest.approx(0.25 * (1 + math.sqrt(0.5)))
    assert correction.weight(500, 100, 500) == pytest.approx(0)
    # A run without mutual learning.
    assert correction.weight(100, 100, 100) == 0.5


def test_mixing_by_hand():
    found = made_labels(
        labels=[1, 1],
        class_quality=[0.8, 0.6],
        mask_quality=[0.9, 0.9],
        distribution=[[0.8, 0.1, 0.0], [0.6, 0.3, 0.0]],
    )
    second = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    mixed = correction.fuse(found, second, 0.5)
    # The teacher's over the classes alone: 8/9 and 1/9, 2/3 and 1/3.
    # 4/9 against 1/18 + 1/2: corrected; 1/3 + 1/2 against 1/6: confirmed.
    assert mixed.labels.tolist() == [2, 1]
    torch.testing.assert_close(mixed.class_quality, torch.tensor([5 / 9, 5 / 6]))
    # Late in training the same opinion no longer counts.
    assert correction.fuse(found, second, 0.1).labels.tolist() == [1, 1]
    # And where there is none, nothing changes.
    same = correction.fuse(found, torch.zeros(2, 3), 0.5)
    assert torch.equal(same.distribution, found.distribution)
    # What came in is as it was.
    assert found.labels.tolist() == [1, 1]


@pytest.fixture(scope="module")
def seen(shapes_folder):
    """Prototypes that an untrained network made of 24 images, and the other 16 images."""
    torch.manual_seed(0)
    size = augment.ViewSize(96, 96, 160)
    net = networks.build_small(7, 96, 160).eval()
    dataset = load_coco(f"{shapes_folder}/instances_train.json", f"{shapes_folder}/train")
    labeled = data.Stream(dataset, list(range(24)), size, 0, True)
    others = data.Stream(dataset, list(range(24, 40)), size, 1, True)
    second = prototypes.Prototypes(6, 64, 32)
    for k in range(0, 24, 8):
        second.learn(net, [labeled[k + i] for i in range(8)])
    return net, second, labeled, others


def as_pseudo(net, item) -> teacher.PseudoLabels:
    """The truth of an image in the form of pseudo-labels."""
    target = item["target"]
    n = len(target["labels"])
    features = inference.features_in(net, [item["image"]], [target["boxes"]])[0]
    masks = target["masks"].bool()
    return teacher.PseudoLabels(
        target["boxes"], target["labels"], torch.ones(n), torch.ones(n), masks.float(), masks,
        torch.full((n, 6), 1 / 6), features, torch.zeros(n, 1, 28, 28), target["boxes"],
    )  # fmt: skip


def test_prototypes_know_again_what_they_have_seen(seen):
    net, second, labeled, _ = seen
    right = []
    for k in range(24):
        found = as_pseudo(net, labeled[k])
        opinion = second(labeled[k]["image"], found)
        torch.testing.assert_close(opinion.sum(1), torch.ones(len(found)))
        right += (opinion.argmax(1) + 1 == found.labels).tolist()
    assert sum(right) / len(right) > 0.9


def test_prototypes_name_unseen_shapes_better_than_chance(seen):
    """An untrained network's features know nothing of classes; silhouettes do."""
    net, second, _, others = seen
    right = []
    for k in range(16):
        found = as_pseudo(net, others[k])
        right += (second(others[k]["image"], found).argmax(1) + 1 == found.labels).tolist()
    # Chance is 1/6, of some 40 instances.
    assert len(right) > 30 and sum(right) / len(right) > 0.5


def test_descriptions_are_of_length_one_and_ignore_what_is_outside_the_mask():
    masks = torch.zeros(1, 96, 96)
    masks[0, 20:60, 20:40] = 1
    boxes = torch.tensor([[20.0, 20.0, 60.0, 60.0]])
    features = torch.rand(1, 64, 7, 7)
    one = prototypes.Prototypes.describe(features, masks, boxes)
    torch.testing.assert_close(one.norm(dim=1), torch.ones(1))
    # Columns 4 to 7 of 7 are right of the mask, whose right half of the box is empty.
    features[..., 4:] = 9
    assert torch.equal(one, prototypes.Prototypes.describe(features, masks, boxes))


def test_the_memory_keeps_the_newest_and_counts_only_what_is_there(seen):
    net, _, labeled, _ = seen
    second = prototypes.Prototypes(6, 64, 2)
    asked = made_labels([1], [0.9], [0.9], torch.full((1, 6), 0.1), (64, 7, 7))
    nothing = second(torch.rand(3, 96, 96), asked)
    # Nothing seen, no opinion.
    assert nothing.tolist() == [[0.0] * 6]
    items = [labeled[k] for k in range(8)]
    second.learn(net, items)
    labels = torch.cat([item["target"]["labels"] for item in items])
    assert second.seen.tolist() == torch.bincount(labels, minlength=7)[1:].tolist()
    # Two places: the last instance of a class lies where the count says.
    last = max(k for k, item in enumerate(items) if (item["target"]["labels"] == 1).any())
    found = as_pseudo(net, items[last])
    row = second.describe(found.features, found.mask_probs, found.boxes)[found.labels == 1][-1]
    torch.testing.assert_close(second.bank[0, (second.seen[0] - 1) % 2], row)


def test_an_image_without_instances_teaches_nothing_and_asks_nothing(seen):
    net = seen[0]
    second = prototypes.Prototypes(6, 64, 4)
    none = dict(
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        masks=torch.zeros(0, 96, 96, dtype=torch.uint8),
    )
    item = dict(image=torch.rand(3, 96, 96), target=none)
    second.learn(net, [item, item])
    assert second.seen.sum() == 0
    assert seen[1](item["image"], as_pseudo(net, item)).shape == (0, 6)


def bank_of(cosines: list[list[float]], found, size: int = 4) -> prototypes.Prototypes:
    """Prototypes whose instances have given cosines with the one found instance."""
    second = prototypes.Prototypes(len(cosines), 1, size)
    query = second.describe(found.features, found.mask_probs, found.feature_boxes)[0]
    other = torch.randn_like(query)
    other = other - (other @ query) * query
    other = other / other.norm()
    for k, row in enumerate(cosines):
        for place, cosine in enumerate(row):
            second.bank[k, place] = cosine * query + math.sqrt(1 - cosine**2) * other
        second.seen[k] = len(row)
    return second


def test_the_opinion_is_of_the_nearest_three_by_hand():
    """Mean cosines of the best three: 0.50, 0.49 and 0.48; the means of all say otherwise."""
    found = made_labels([1], [0.9], [0.9])
    cosines = [[0.51, 0.50, 0.49, 0.1], [0.49, 0.49, 0.49, 0.49], [0.40, 0.52, 0.48, 0.44]]
    opinion = bank_of(cosines, found)(torch.zeros(3, 20, 20), found)
    means = torch.tensor([[0.50, 0.49, 0.48]])
    torch.testing.assert_close(opinion, (means / 0.005).softmax(1), atol=1e-3, rtol=0)


def test_places_that_are_empty_have_no_say():
    """Cosines below 0, which is what an empty place would have; a class of one instance."""
    found = made_labels([1], [0.9], [0.9])
    second = bank_of([[-0.50], [-0.49, -0.50, -0.51], [-0.51, -0.52, -0.50, -0.51]], found)
    means = torch.tensor([[-0.50, -0.50, -0.51 + 0.01 / 3]])
    opinion = second(torch.zeros(3, 20, 20), found)
    torch.testing.assert_close(opinion, (means / 0.005).softmax(1), atol=1e-3, rtol=0)
    # Nothing in the memory at all, or nobody to ask about: no opinion.
    nothing = prototypes.Prototypes(3, 1, 4)
    assert nothing(torch.zeros(3, 20, 20), found).tolist() == [[0.0] * 3]
    none = found[torch.zeros(1, dtype=torch.bool)]
    assert second(torch.zeros(3, 20, 20), none).shape == (0, 3)


def test_of_a_class_never_seen_the_teacher_decides():
    """It keeps its 0.4; the two known classes share the other 0.6 as they are near."""
    found = made_labels([1, 1], [0.5, 0.5], [0.9, 0.9], distribution=[[0.5, 0.1, 0.4]] * 2)
    second = bank_of([[0.51], [0.50], []], found[:1])
    opinion = second(torch.zeros(3, 20, 20), found)
    torch.testing.assert_close(opinion.sum(1), torch.ones(2))
    shares = torch.tensor([0.51, 0.50]).div(0.005).softmax(0)
    expected = torch.cat([0.6 * shares, torch.tensor([0.4])])
    torch.testing.assert_close(opinion[0], expected, atol=1e-3, rtol=0)


def test_a_class_that_was_never_seen_keeps_what_the_teacher_gives_it(seen):
    net, full, labeled, _ = seen
    second = prototypes.Prototypes(6, 64, 4)
    for k in (0, 1):
        second.bank[k], second.seen[k] = full.bank[k, :4], 4
    found = as_pseudo(net, labeled[0])
    found.distribution[:] = torch.tensor([0.1, 0.1, 0.1, 0.05, 0.05, 0.5])
    opinion = second(labeled[0]["image"], found)
    # Of the probability without background: the row sums to 0.9.
    torch.testing.assert_close(opinion[:, 2:], found.distribution[:, 2:] / 0.9)
    torch.testing.assert_close(opinion.sum(1), torch.ones(len(found)))
    # So the teacher's choice of such a class cannot be outvoted by those that are known.
    mixed = correction.fuse(found, torch.tensor([[0.3, 0, 0.1, 0.05, 0.05, 0.5]]), 0.5)
    assert (mixed.labels == 6).all()


def test_mixing_is_the_loop_over_the_logits_without_background():
    """PL-DC Eq. (DICC) as written: softmax of the teacher's logits of the C classes.

    Logits of 30 and a background that has all of the probability are among them.
    """
    logits = torch.tensor(
        [[2.0, 1.0, 0.0, 1.5], [30.0, 0.0, 0.0, -30.0], [-3.0, 0.0, 1.0, 12.0], [0.0, 0.1, 0.2, 30]]
    ).double()
    opinion = torch.tensor([[0.1, 0.8, 0.1], [0.0, 0.1, 0.9], [0.0, 0.0, 0.0], [0.3, 0.3, 0.4]])
    distribution = logits.softmax(1)[:, :3].float()
    found = made_labels([1, 1, 3, 3], [0.5] * 4, [0.9] * 4, distribution=distribution)
    for w in (0.5, 0.25, 0.01):
        mixed = correction.fuse(found, opinion, w)
        for n in range(4):
            if not opinion[n].any():
                assert torch.equal(mixed.distribution[n], distribution[n])
                continue
            exp = [math.exp(z) for z in logits[n, :3].tolist()]
            wanted = [w * opinion[n, k].item() + (1 - w) * exp[k] / sum(exp) for k in range(3)]
            assert mixed.distribution[n].tolist() == pytest.approx(wanted, abs=1e-5)
            best = max(range(3), key=lambda k: wanted[k])
            assert mixed.labels[n] == best + 1
            assert mixed.class_quality[n].item() == pytest.approx(wanted[best], abs=1e-5)


def test_without_weight_or_opinion_a_label_stays_even_if_it_is_not_the_likeliest():
    """A proposal can be detected as two classes; the lesser one is no argmax."""
    found = made_labels([2], [0.35], [0.9], distribution=[[0.6, 0.35, 0.0]])
    for second, w in ((torch.zeros(1, 3), 0.5), (torch.tensor([[1.0, 0.0, 0.0]]), 0.0)):
        same = correction.fuse(found, second, w)
        assert same.labels.tolist() == [2] and same.class_quality.tolist() == pytest.approx([0.35])
