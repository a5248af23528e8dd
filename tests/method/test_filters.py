"""PL-DC's instance level: each rule by hand, the thresholds by hand and as a property."""

import dataclasses

import pytest
import torch
from conftest import made_labels

from ssis import filters

pytestmark = pytest.mark.fast

# T_min and T_max, of the class and of the mask.
RANGES = ((0.5, 0.9), (0.5, 0.9))


def kept_by(predictions, rule: str, tau_class: float = 0.7, thresholds=None):
    """What a rule keeps, with a mask threshold of 0.8 and 5 pixels."""
    return filters.keep(predictions, rule, tau_class, 0.8, 5, thresholds)


def test_the_four_rules_by_hand():
    """A clean mask of doubtful class, a sure class with a ragged mask, both, neither."""
    found = made_labels(
        labels=[1, 1, 2, 2],
        class_quality=[0.65, 0.95, 0.9, 0.5],
        mask_quality=[0.99, 0.75, 0.9, 0.6],
    )
    kept = {
        rule: kept_by(found, rule).class_quality.tolist() for rule in ("score", "coupled", "dual")
    }
    assert kept["score"] == pytest.approx([0.95, 0.9])
    # 0.64, 0.71, 0.81, 0.3: the good class made up for the ragged mask.
    assert kept["coupled"] == pytest.approx([0.95, 0.9])
    assert kept["dual"] == pytest.approx([0.9])
    # And a product of 0.64 passes at 0.6, though its class would not.
    coupled = kept_by(found, "coupled", 0.64)
    assert coupled.class_quality.tolist() == pytest.approx([0.65, 0.95, 0.9])


def test_each_class_has_its_own_adaptive_threshold():
    found = made_labels(labels=[1, 2, 3], class_quality=[0.6] * 3, mask_quality=[0.8] * 3)
    thresholds = filters.Thresholds(3, *RANGES, 0.99)
    thresholds.values.copy_(torch.tensor([[0.5, 0.7, 0.5], [0.7, 0.7, 0.85]]))
    # The second fails on its class, the third on its mask.
    assert kept_by(found, "adaptive", thresholds=thresholds).labels.tolist() == [1]


def test_the_calibrated_rule_asks_whether_something_is_there_whatever_it_is():
    """Deer or bear, surely one; a sure deer beside it; and background."""
    found = made_labels(
        labels=[2, 1, 2, 3],
        class_quality=[0.7, 0.5, 0.4, 0.35],
        mask_quality=[0.9] * 4,
        distribution=[[0.0, 0.7, 0.0], [0.5, 0.45, 0.0], [0.5, 0.4, 0.0], [0.1, 0.1, 0.35]],
    )
    # The second and the third are candidates for one object: that with the higher o stays.
    found.boxes[0] = torch.tensor([0.0, 13.0, 10.0, 20.0])
    found.boxes[3] = torch.tensor([13.0, 0.0, 20.0, 3.0])
    assert filters.foreground(found).tolist() == pytest.approx([0.7, 0.95, 0.9, 0.55])
    assert filters.objects(found).labels.tolist() == [2, 1, 3]
    thresholds = filters.Thresholds(3, *RANGES, 0.99)
    thresholds.values.copy_(torch.tensor([[0.9, 0.71, 0.5], [0.8, 0.8, 0.8]]))
    # 0.7 is too little for class 2; 0.95 is enough for class 1, though its c is one half.
    kept = kept_by(found, "calibrated", thresholds=thresholds)
    assert kept.labels.tolist() == [1, 3] and kept.class_quality.tolist() == pytest.approx(
        [0.5, 0.35]
    )
    # The mask has a threshold of its own.
    thresholds.values[1, 0] = 0.95
    assert kept_by(found, "calibrated", thresholds=thresholds).labels.tolist() == [3]
    assert len(kept_by(found[:0], "calibrated", thresholds=thresholds)) == 0


def test_what_is_too_small_suppresses_nothing():
    """The surest candidate for an object has a mask of a few pixels, the second one a whole."""
    found = made_labels([1, 2], [0.8, 0.7], [0.9, 0.9], [[0.95, 0, 0], [0, 0.9, 0]])
    thresholds = filters.Thresholds(3, *RANGES, 0.99)
    thresholds.values.fill_(0.6)
    assert kept_by(found, "calibrated", thresholds=thresholds).labels.tolist() == [1]
    found.masks[0, 5:] = found.masks[0, :, 9:] = False  # five pixels are left
    assert kept_by(found, "calibrated", thresholds=thresholds).labels.tolist() == [2]


def test_few_pixels_are_dropped_whatever_the_scores():
    found = made_labels(labels=[1, 1], class_quality=[1.0, 1.0], mask_quality=[1.0, 1.0])
    found.masks[0] = False
    found.masks[0].view(-1)[:5] = True
    for rule in ("score", "coupled", "dual"):
        assert len(kept_by(found, rule)) == 1
    found.masks[0].view(-1)[5] = True
    assert len(kept_by(found, "dual")) == 2


def test_score_is_strict_and_the_others_are_not():
    found = made_labels(labels=[1], class_quality=[0.7], mask_quality=[0.8])
    # GD: "larger than"; PL-DC: "at least".
    assert len(kept_by(found, "score")) == 0
    assert len(kept_by(found, "dual")) == 1


def test_first_thresholds_by_hand():
    """PL-DC Eq. (init): the rare class low, the common one high, for both qualities."""
    thresholds = filters.Thresholds(3, *RANGES, 0.99)
    thresholds.start(torch.tensor([0.25, 0.75, 0.0]))
    expected = torch.tensor([[0.6, 0.8, 0.5]]).repeat(2, 1)
    torch.testing.assert_close(thresholds.values, expected)


def test_thresholds_on_a_device_start_from_a_frequency_on_the_cpu():
    """The frequencies are counted on the CPU; "meta" refuses a mixture as a GPU does."""
    thresholds = filters.Thresholds(3, (0.5, 0.9), (0.6, 0.7), 0.99).to("meta")
    thresholds.start(torch.tensor([0.25, 0.75, 0.0]))
    assert thresholds.values.device.type == "meta"


def test_adaptive_thresholds_by_hand():
    """PL-DC Eq. (init) and (adapt): two classes, one of which is not seen."""
    thresholds = filters.Thresholds(2, *RANGES, 0.75)
    thresholds.start(torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(thresholds.values, torch.tensor([[0.6, 0.8], [0.6, 0.8]]))
    # 0.4 is no candidate: it is under T_min.
    found = made_labels(
        labels=[1, 1, 1], class_quality=[0.7, 0.9, 0.4], mask_quality=[0.6, 1.0, 0.1]
    )
    thresholds.update([found, found[torch.zeros(3, dtype=torch.bool)]])
    # 0.75 x 0.6 + 0.25 x 0.8 = 0.65 for both qualities of class 1.
    torch.testing.assert_close(thresholds.values, torch.tensor([[0.65, 0.8], [0.65, 0.8]]))


def test_adaptive_thresholds_converge_to_the_quality_and_stay_in_their_range():
    thresholds = filters.Thresholds(2, *RANGES, 0.9)
    thresholds.start(torch.tensor([0.5, 0.5]))
    found = made_labels(labels=[1, 2], class_quality=[0.6, 0.99], mask_quality=[0.55, 0.3])
    for _ in range(200):
        thresholds.update([found])
    expected = torch.tensor([[0.6, 0.9], [0.55, 0.5]])
    torch.testing.assert_close(thresholds.values, expected, atol=1e-4, rtol=0)


def test_class_and_mask_have_ranges_of_their_own():
    """PL-DC Eq. (init) and (adapt), in [0.5, 0.9] and in [0.6, 0.7]."""
    thresholds = filters.Thresholds(2, (0.5, 0.9), (0.6, 0.7), 0.5)
    thresholds.start(torch.tensor([0.25, 0.75]))
    expected = torch.tensor([[0.6, 0.8], [0.625, 0.675]])
    torch.testing.assert_close(thresholds.values, expected)
    found = made_labels(labels=[1, 2], class_quality=[0.8, 0.5], mask_quality=[0.99, 0.51])
    thresholds.update([found])
    expected = torch.tensor([[0.7, 0.65], [0.7, 0.6]])
    torch.testing.assert_close(thresholds.values, expected)


def three_way(c: float, m: float, fused: float, label: int, own: torch.Tensor) -> bool:
    """ssis Eq. (ambiguous), as the text says it, for one instance of class 1.

    Args:
        c, m: the teacher's qualities.
        fused, label: class quality and class after the correction.
        own: (2, C), T_k.
    """
    if c < 0.5 or m < 0.6:
        return False
    certain = c >= own[0, 0] and m >= own[1, 0]
    return bool(certain or fused >= own[0, label - 1])


def test_the_three_way_filter_agrees_with_its_loop():
    """Every combination of low, ambiguous and high qualities, before and after correction."""
    thresholds = filters.Thresholds(2, (0.5, 0.9), (0.6, 0.95), 0.99)
    thresholds.values.copy_(torch.tensor([[0.7, 0.8], [0.9, 0.65]]))
    cases = [
        (c, m, fused, label)
        for c in (0.45, 0.5, 0.65, 0.7, 0.99)
        for m in (0.55, 0.6, 0.85, 0.9)
        for fused in (0.3, 0.69, 0.75, 0.8)
        for label in (1, 2)
    ]
    columns = [list(column) for column in zip(*cases, strict=True)]
    found = made_labels([1] * len(cases), columns[0], columns[1])
    kept = filters.keep(found, "three-way", 0.0, 0.0, 5, thresholds)
    assert len(kept) == 4 * 3 * 8
    # Correction changes classes and class qualities, and neither order nor number.
    here = (found.class_quality >= 0.5) & (found.mask_quality >= 0.6)
    corrected = dataclasses.replace(
        kept,
        class_quality=torch.tensor(columns[2])[here],
        labels=torch.tensor(columns[3])[here],
    )
    decided = filters.decide(corrected, kept, thresholds)
    wanted = [case for case in cases if three_way(*case, thresholds.values)]
    assert 0 < len(wanted) < len(kept)
    assert decided.class_quality.tolist() == pytest.approx([case[2] for case in wanted])
    assert decided.labels.tolist() == [case[3] for case in wanted]


def test_an_unknown_rule_is_an_error():
    found = made_labels(labels=[1], class_quality=[0.9], mask_quality=[0.9])
    with pytest.raises(ValueError, match="no rule 'adaptiv'"):
        kept_by(found, "adaptiv")


def test_thresholds_follow_what_all_processes_saw(monkeypatch):
    """Another process with the same predictions and two more of class 2: sums are added."""
    thresholds = filters.Thresholds(2, *RANGES, 0.5)
    thresholds.values.fill_(0.6)
    more = torch.tensor([[0.0, 1.6], [0.0, 1.4], [0.0, 2.0]])
    monkeypatch.setattr(filters.distributed, "all_sum", lambda sums: 2 * sums + more)
    thresholds.update([made_labels(labels=[1], class_quality=[0.9], mask_quality=[0.7])])
    # Class 1: 0.9 and 0.7, seen twice; class 2, not seen here: 0.8 and 0.7.
    expected = torch.tensor([[0.75, 0.7], [0.65, 0.65]])
    torch.testing.assert_close(thresholds.values, expected)
