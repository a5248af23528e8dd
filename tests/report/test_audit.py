"""The audit: cases small enough to count by hand, and its limits.

Claims: the numbers are those of a count by hand; boxes are matched one to one; a fraction of
nothing is None; images are read one at a time; the oracle replaces what it says; a teacher that
collapses or explodes, as a whole or in one class, is reported with advice for its filter.
"""

import weakref

import pytest
import torch

from ssis.report import audit
from ssis.targets import boxes_of, match, sanitize
from ssis.teacher import PseudoLabels

pytestmark = pytest.mark.fast


def squares(places, size=40):
    masks = torch.zeros(len(places), size, size, dtype=torch.bool)
    for mask, (x, y, side) in zip(masks, places, strict=True):
        mask[y : y + side, x : x + side] = True
    return masks


def pseudo(places, labels):
    masks, n = squares(places), len(places)
    boxes = boxes_of(masks) if n else torch.zeros(0, 4)
    return PseudoLabels(
        boxes,
        torch.tensor(labels, dtype=torch.int64),
        torch.ones(n),
        torch.ones(n),
        masks.float(),
        masks,
        torch.zeros(n, 3),
        torch.zeros(n, 1, 7, 7),
        torch.zeros(n, 1, 28, 28),
        boxes,
    )


def ground_truth(places, labels):
    masks = squares(places)
    return sanitize(dict(masks=masks.to(torch.uint8), labels=torch.tensor(labels)))


def test_the_audit_counts_as_a_person_would():
    # Exact and right; shifted by 2 of 10 and of the wrong class; a duplicate; nowhere.
    kept = pseudo([(0, 0, 10), (20, 2, 10), (1, 0, 10), (28, 28, 10)], [1, 2, 1, 3])
    true = ground_truth([(0, 0, 10), (20, 0, 10), (0, 20, 8)], [1, 3, 2])
    result = audit.summary(audit.tally(kept, true, 3), images=1, labeled_per_image=2.5)
    assert result == dict(
        pseudo_per_image=4.0,
        labeled_per_image=2.5,
        box_precision=0.5,
        class_accuracy=0.5,
        mask_iou=round((1 + 80 / 120) / 2, 4),
        recall=round(2 / 3, 4),
    )
    by_class = audit.per_class(audit.tally(kept, true, 3), 1, ["a", "b", "c"])
    assert by_class["a"]["box_precision"] == 0.5 and by_class["a"]["class_accuracy"] == 1.0
    assert by_class["b"]["class_accuracy"] == 0.0 and by_class["b"]["recall"] == 0.0
    assert by_class["c"]["recall"] == 1.0 and by_class["c"]["labeled_per_image"] == 1.0


def test_matching_by_hand():
    """A duplicate has to take the second best; 5 of 10 is enough, less is not; none is -1."""
    instances = torch.tensor(
        [[0.0, 0.0, 10.0, 10.0], [2.0, 0.0, 12.0, 10.0], [30.0, 0.0, 40.0, 10.0]]
    )
    boxes = torch.tensor(
        [
            [0.0, 0.0, 10.0, 10.0],  # the first, exactly
            [0.5, 0.0, 10.5, 10.0],  # nearer to the first, which is taken: the second
            [0.0, 0.0, 10.0, 10.0],  # nothing is left of them
            [30.0, 0.0, 34.9, 10.0],  # 0.49 of the third
            [30.0, 0.0, 35.0, 10.0],  # 0.50 of it
        ]
    )
    assert match(boxes, instances).tolist() == [0, 1, -1, -1, 2]
    assert match(boxes, instances[:0]).tolist() == [-1] * 5
    assert match(boxes[:0], instances).shape == (0,)


def test_a_fraction_of_nothing_is_none():
    true = ground_truth([(0, 0, 9)], [1])
    none = audit.summary(audit.tally(pseudo([], []), true, 3), 1, 1.0)
    assert none["box_precision"] is None and none["recall"] == 0.0
    empty = dict(
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        masks=torch.zeros(0, 40, 40),
    )
    spurious = audit.summary(audit.tally(pseudo([(0, 0, 9)], [1]), empty, 3), 1, 1.0)
    assert spurious["box_precision"] == 0.0 and spurious["recall"] is None


def watched(rule: str, labels: list[list[int]], shares: list[float], per_image: float) -> list:
    """What a watch of three classes says of images with such pseudo-labels."""
    names, lines = ["ring", "star", "hook"], []
    watch = audit.Watch(names, rule, per_image, torch.tensor(shares))
    for k in range(0, len(labels), 4):
        watch.add([torch.tensor(each, dtype=torch.int64) for each in labels[k : k + 4]])
    watch.report(lines.append)
    # What was reported is not counted again.
    watch.report(lines.append)
    return lines


@pytest.mark.parametrize("kept, word", [(0, "collapsed"), (2, None), (15, "explodes")])
def test_a_collapsing_and_an_exploding_teacher_are_reported(kept, word):
    rules = dict(score="--tau-class", coupled="--tau-class", adaptive="--tau-min")
    rules["three-way"] = "--tau-mask-max"
    for rule, flag in dict(rules, dual="--tau-class or --tau-mask").items():
        lines = watched(rule, 8 * [[1] * kept], [1.0, 0.0, 0.0], 2.5)
        assert len(lines) == (word is not None)
        # With the advice that belongs to the filter.
        assert word is None or (word in lines[0] and flag in lines[0])


def test_an_unknown_filter_and_an_unknown_oracle_are_errors():
    with pytest.raises(ValueError, match="unknown filter 'sure'"):
        audit.Watch(["a"], "sure", 1.0, torch.ones(1))
    with pytest.raises(ValueError, match="unknown oracle 'boxes'"):
        audit.apply_oracle(pseudo([], []), {}, "boxes")


def test_stages_are_audited_one_image_at_a_time():
    """`pairs` may be a generator; the next image is asked for when the last one is counted."""
    target = ground_truth([(0, 0, 10)], [1])
    released = []

    def pairs():
        for k in range(3):
            kept = pseudo([(0, 0, 10)], [1 + k % 2])
            weakref.finalize(kept, released.append, k)
            stages = dict(kept=[kept], final=[kept])
            del kept
            yield dict(target=target), stages
            stages.clear()
            # At most the last one is still in the hands of the caller.
            assert len(released) >= k

    result = audit.measure(pairs(), ["a", "b", "c"], 2.0, 3, torch.device("cpu"))
    assert result["audit"] == result["audit_stages"]["kept"]
    assert result["audit"]["class_accuracy"] == round(2 / 3, 4)
    assert result["audit"]["pseudo_per_image"] == 1.0 and result["audit"]["recall"] == 1.0
    assert result["audit_per_class"]["b"]["class_accuracy"] == 0.0
    nothing = audit.measure(iter(()), ["a"], 2.0, 0, torch.device("cpu"))
    assert nothing == dict(audit=None, audit_per_class=None, audit_stages=None)


def test_a_class_that_is_lost_or_overrun_is_named():
    # 40 images with 2 instances each of which half are rings: 40 rings, 36 stars, 4 hooks.
    shares = [0.5, 0.45, 0.05]
    assert watched("score", 40 * [[1, 2]], shares, 2.0) == []
    (line,) = watched("score", 40 * [[1, 1]], shares, 2.0)
    # Hooks: none as well, but of four nothing can be said.
    assert "next to none of the pseudo-labels are of class star (0, 36 expected);" in line
    (line,) = watched("adaptive", 40 * [[1, 1, 2]], [0.5, 0.25, 0.25], 2.0)
    assert "next to none" in line and "hook (0, 20 expected)" in line
    (line,) = watched("score", 40 * [[1, 2, *[3] * 6]], [0.4, 0.35, 0.25], 2.0)
    assert "far too many of the pseudo-labels are of class hook (240, 20 expected)" in line
    assert "raise --tau-class" in line


def test_the_oracle_replaces_what_it_says_and_nothing_else():
    # On the first instance, shifted and of the wrong class; and nowhere.
    kept = pseudo([(2, 0, 10), (28, 28, 10)], [2, 3])
    true = ground_truth([(0, 0, 10), (20, 0, 10)], [1, 3])
    by_class = audit.apply_oracle(kept, true, "class")
    assert by_class.labels.tolist() == [1, 3] and torch.equal(by_class.masks, kept.masks)
    by_mask = audit.apply_oracle(kept, true, "mask")
    assert by_mask.labels.tolist() == [2, 3]
    assert torch.equal(by_mask.masks[0], true["masks"][0].bool())
    assert by_mask.boxes.tolist() == [[0, 0, 10, 10], [28, 28, 38, 38]]
    both = audit.apply_oracle(kept, true, "both")
    perfect = audit.summary(audit.tally(both, true, 3), 1, 2.0)
    assert perfect["class_accuracy"] == 1.0 and perfect["mask_iou"] == 1.0
    # What lies on nothing is still wrong, and what was not found still missing.
    assert perfect["box_precision"] == 0.5 and perfect["recall"] == 0.5
    assert kept.labels.tolist() == [2, 3]


def test_a_true_mask_of_the_oracle_is_trained_with_its_full_weight():
    """What SAM and the teacher agreed on was said of another mask."""
    kept = pseudo([(2, 0, 10), (28, 28, 10)], [2, 3])
    kept.mask_quality = torch.tensor([0.3, 0.3])
    true = ground_truth([(0, 0, 10), (20, 0, 10)], [1, 3])
    weights = audit.apply_oracle(kept, true, "mask").mask_quality
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.3]))
    assert (
        audit.apply_oracle(kept, true, "class").mask_quality.tolist() == kept.mask_quality.tolist()
    )
