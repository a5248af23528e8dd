"""Distribution alignment by hand: ssis Eq. (alignment) and ssis Eq. (shares)."""

import pytest
import torch
from conftest import made_labels

from ssis import alignment
from ssis.alignment import DECAY, Alignment

pytestmark = pytest.mark.fast


def named(*distributions):
    """One image's pseudo-labels with these class distributions."""
    p = torch.tensor(distributions).reshape(-1, 2)
    labels = (p.argmax(dim=1) + 1).tolist() if len(p) else []
    return made_labels(labels, p.amax(dim=1).tolist() if len(p) else [], [0.8] * len(p), p)


def test_a_class_that_is_named_too_often_loses_what_is_doubtful():
    """Shares 1 : 3, named 3 : 1, so that class 2 counts nine times as much as class 1."""
    one = Alignment(torch.tensor([0, 1]))
    # One more in all, half of it for each class.
    assert one.shares.tolist() == [0.25, 0.75] == one.named.tolist()
    one.named.copy_(torch.tensor([0.75, 0.25]))
    pseudo = named([0.8, 0.2], [0.95, 0.05])
    aligned = one(pseudo)
    # 0.8 : 0.2 * 9 and 0.95 : 0.05 * 9.
    assert aligned.labels.tolist() == [2, 1]
    assert aligned.class_quality.tolist() == pytest.approx([1.8 / 2.6, 0.95 / 1.4])
    # The teacher's own numbers and masks stay, and so does what was given.
    assert torch.equal(aligned.distribution, pseudo.distribution)
    assert torch.equal(aligned.masks, pseudo.masks) and pseudo.labels.tolist() == [1, 1]
    # Background has no say: the half of everything names the same.
    half = one(named([0.4, 0.1], [0.475, 0.025]))
    assert half.labels.tolist() == [2, 1]
    torch.testing.assert_close(half.class_quality, aligned.class_quality)


@pytest.mark.parametrize("annotated", [[5, 1], [997, 2], [0, 9]])
def test_named_as_annotated_nothing_changes(annotated):
    """Of rare classes neither."""
    one = Alignment(torch.tensor(annotated))
    aligned = one(named([0.6, 0.3], [0.2, 0.8]))
    assert aligned.labels.tolist() == [1, 2]
    assert aligned.class_quality.tolist() == pytest.approx([2 / 3, 0.8])


def test_a_class_that_is_never_named_is_multiplied_by_ten():
    one = Alignment(torch.tensor([9, 9]))
    one.named.copy_(torch.tensor([1.0, 0.0]))
    # 0.5 / 1 against ten: twenty times.
    aligned = one(named([0.951, 0.049], [0.954, 0.046]))
    assert aligned.labels.tolist() == [2, 1]


def test_the_mean_is_over_the_instances_of_all_images_and_follows_slowly():
    one = Alignment(torch.tensor([1, 1]))
    # 0.3 : 0.1 is 0.75 : 0.25 without background; the mean of the three is 0.25 : 0.75.
    one.update([named([0.3, 0.1]), named([0.0, 1.0], [0.0, 0.5]), named()])
    expected = [DECAY * 0.5 + (1 - DECAY) * share for share in (0.25, 0.75)]
    assert one.named.tolist() == pytest.approx(expected)
    before = one.named.clone()
    one.update([named(), named()])
    assert torch.equal(one.named, before)
    assert len(one(named())) == 0


def test_the_mean_is_over_all_processes(monkeypatch):
    """Another process with three instances of class 2, this one with one of class 1."""
    one = Alignment(torch.tensor([1, 1]))
    more = torch.tensor([0.0, 3.0, 3.0])
    monkeypatch.setattr(alignment.distributed, "all_sum", lambda sums: sums + more)
    one.update([named([1.0, 0.0])])
    assert one.named.tolist() == pytest.approx(
        [DECAY * 0.5 + (1 - DECAY) * share for share in (0.25, 0.75)]
    )


def test_a_class_that_was_crowded_out_comes_back():
    """The teacher names nine of ten doubtful ones class 1, where half are class 2: in the end
    as many are named class 2 as are annotated."""
    torch.manual_seed(0)
    one = Alignment(torch.tensor([50, 50]))
    p = 0.5 + 0.2 * torch.rand(1000) - 0.02
    pseudo = named(*torch.stack([p, 1 - p], dim=1).tolist())
    assert (pseudo.labels == 2).float().mean() < 0.15
    for _ in range(1000):
        one.update([pseudo])
    # With m the mean of p, the odds are those over the mean odds: the median changes sides.
    assert (one(pseudo).labels == 2).float().mean() == pytest.approx(0.5, abs=0.05)
