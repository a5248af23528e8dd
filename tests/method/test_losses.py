"""The loss table: averaging over processes, by hand; PL-DC's weights of the mask loss."""

import math

import pytest
import torch

from ssis import losses

pytestmark = pytest.mark.fast


def table(values, counts):
    return dict(zip(losses.COUNT_OF, map(torch.tensor, values), strict=True)), torch.tensor(counts)


def test_on_one_process_the_total_is_the_plain_sum():
    values, counts = table([1.0, 2.0, 3.0, 4.0, 5.0], [256.0, 256.0, 64.0, 64.0, 0.0])
    # The mask loss over no foreground is 0 in torchvision.
    values["loss_mask"] = torch.tensor(0.0)
    assert losses.total(values, counts, counts, world_size=1) == 10.0


def test_the_mean_over_processes_is_the_loss_of_the_global_batch():
    """Rank 0 has 3 foreground proposals with losses 1, 2, 3; rank 1 has one with 10."""
    ranks = [([0.0] * 4 + [2.0], [8.0] * 4 + [3.0]), ([0.0] * 4 + [10.0], [8.0] * 4 + [1.0])]
    total_counts = torch.tensor([16.0] * 4 + [4.0])
    totals = [losses.total(*table(*rank), total_counts, world_size=2) for rank in ranks]
    assert sum(totals) / 2 == (1 + 2 + 3 + 10) / 4


def test_a_process_without_instances_counts_for_nothing():
    values, counts = table([1.0] * 5, [4.0] * 5)
    assert losses.total(values, counts, counts, world_size=2) / 2 == 5.0


def test_rows_have_the_same_keys_whether_or_not_the_pass_took_place():
    values, counts = table([1.0, 2.0, 3.0, 4.0, 5.0], [4.0, 4.0, 2.0, 2.0, 1.0])
    full = losses.logged(values, counts, "unlabeled/")
    empty = losses.logged(None, torch.zeros(5), "unlabeled/")
    assert full.keys() == empty.keys()
    means = losses.means({name: full[name] + empty[name] for name in full})
    assert list(means.values()) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert set(losses.means(empty).values()) == {0.0}


def test_the_weight_of_background_is_that_of_a_weighted_mean():
    """GD Eq. (no object) against PyTorch's own weights of classes, and as a loop."""
    logits = 30 * torch.randn(50, 4)
    labels = torch.randint(0, 4, (50,))
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    for w in (1.0, 0.1, 0.0):
        mean, count = losses.weighted_mean(each, labels, w)
        own = torch.nn.functional.cross_entropy(
            logits, labels, weight=torch.tensor([w, 1.0, 1.0, 1.0])
        )
        torch.testing.assert_close(mean, own)
        weights = [1.0 if label else w for label in labels.tolist()]
        assert count.item() == pytest.approx(sum(weights), rel=1e-5)
        pairs = zip(weights, each.tolist(), strict=True)
        assert mean.item() == pytest.approx(sum(a * b for a, b in pairs) / sum(weights), rel=1e-5)
    # Background alone at a weight of 0, and nothing at all: no loss, and no 0 / 0.
    assert losses.weighted_mean(each[:3], torch.zeros(3), 0.0)[0] == 0
    assert losses.weighted_mean(each[:0], labels[:0], 0.1)[0] == 0


def test_with_weights_of_background_two_processes_still_equal_one():
    """The weighted mean of 50 samples, and of 20 and 30 of them on two processes."""
    each, labels = torch.rand(50), torch.randint(0, 2, (50,))
    whole, _ = losses.weighted_mean(each, labels, 0.1)
    parts = [losses.weighted_mean(each[s], labels[s], 0.1) for s in (slice(20), slice(20, 50))]
    all_counts = torch.ones(5)
    all_counts[2] = sum(count for _, count in parts)
    found = 0.0
    for mean, count in parts:
        values = {name: torch.tensor(0.0) for name in losses.COUNT_OF}
        counts = torch.ones(5)
        values["loss_classifier"], counts[2] = mean, count
        found += losses.total(values, counts, all_counts, world_size=2) / 2
    torch.testing.assert_close(found, whole)


def test_certainty_by_hand():
    """PL-DC Eq. (PMUA): nothing known at one half, everything at 0 and 1."""
    p = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0])
    torch.testing.assert_close(losses.certainty(p), torch.tensor([1.0, 0.5, 0.0, 0.8, 1.0]))


def test_the_weighted_mask_loss_by_hand_on_four_pixels():
    logits = torch.zeros(1, 3, 2, 2)
    # Only the mask of class 2 counts; a logit of log 3 is a probability of 3/4.
    logits[0, 2] = math.log(3)
    targets = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    weights = torch.tensor([[[1.0, 0.5], [1.0, 0.0]]])
    right, wrong = -math.log(3 / 4), -math.log(1 / 4)
    found = losses.mask_loss(logits, torch.tensor([2]), targets, weights)
    assert found.item() == pytest.approx((right + 0.5 * right + wrong + 0) / 4)


def test_without_proposals_the_mask_loss_is_zero_and_still_has_a_gradient():
    logits = torch.zeros(0, 3, 2, 2, requires_grad=True)
    none = torch.zeros(0, 2, 2)
    loss = losses.mask_loss(logits, torch.zeros(0, dtype=torch.int64), none, none)
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None
