"""The verdict: the interval against a resampling by hand, and the sentences."""

import json

import numpy as np
import pytest
from conftest import write_coco
from types import SimpleNamespace

from ssis.datasets.coco_json import load_coco
from ssis.report import ap, verdict

pytestmark = pytest.mark.fast


@pytest.fixture
def four(tmp_path):
    write_coco(tmp_path)
    return load_coco(str(tmp_path / "coco.json"), str(tmp_path / "images"))


def perfect(dataset, score: float = 0.9) -> list[dict]:
    """The truth as detections."""
    return [
        dict(
            image_id=i, category_id=int(label), score=score, bbox=[0, 0, 1, 1],
            segmentation=rle,
        )
        for i in range(len(dataset))
        for rle, (label, crowd) in zip(dataset.rles(i), dataset.annotations(i), strict=True)
        if not crowd
    ]  # fmt: skip


def test_ap_of_all_images_once_is_pycocotools_own(four):
    truth, results = four.coco(range(len(four))), perfect(four)[1:]
    matches = verdict.evaluated(truth, results)
    expected = ap.average_precision(truth, results, "segm")[0]["AP"]
    assert verdict.resampled_ap(matches, np.arange(len(four))) == pytest.approx(expected, abs=1e-3)


def test_ap_of_a_draw_is_that_of_a_dataset_with_these_images(four):
    """Image 1 twice, image 3 not at all: as if the JSON listed them so."""
    truth, results = four.coco(range(len(four))), perfect(four)
    # One wrong detection in image 1 counts twice.
    results.append(dict(results[0], image_id=1, category_id=1, score=0.99))
    rows = np.array([0, 1, 1, 2])
    found = verdict.resampled_ap(verdict.evaluated(truth, results), rows)
    coco, detections = dict(truth.dataset), []
    coco["images"] = [dict(truth.dataset["images"][r], id=k) for k, r in enumerate(rows.tolist())]
    coco["annotations"] = []
    for k, r in enumerate(rows.tolist()):
        for annotation in truth.dataset["annotations"]:
            if annotation["image_id"] == r:
                number = len(coco["annotations"]) + 1
                coco["annotations"].append(dict(annotation, image_id=k, id=number))
        detections += [dict(d, image_id=k) for d in results if d["image_id"] == r]
    from pycocotools.coco import COCO

    again = COCO()
    again.dataset = coco
    again.createIndex()
    expected = ap.average_precision(again, detections, "segm")[0]["AP"]
    assert found == pytest.approx(expected, abs=1e-3)


def test_the_interval_holds_the_difference_and_is_none_of_two_equal_models(four):
    truth, results = four.coco(range(len(four))), perfect(four)
    assert verdict.paired_interval(truth, results, results) == (0, 0)
    low, high = verdict.paired_interval(truth, results[:1], results)
    gain = 100 - ap.average_precision(truth, results[:1], "segm")[0]["AP"]
    assert low <= gain <= high and low < high
    assert verdict.paired_interval(truth, [], results)[1] == 100


def test_a_large_dataset_is_not_drawn(four, monkeypatch):
    monkeypatch.setattr(verdict, "LARGE", 3)
    assert verdict.paired_interval(four.coco(range(len(four))), [], []) is None


def test_words_of_a_comparison(four):
    truth, all_of_them = four.coco(range(len(four))), perfect(four)
    none = (dict(mask=dict(AP=0.0)), [])
    best = (dict(mask=dict(AP=100.0)), all_of_them)
    assert verdict.compare("nobody", none, best, truth)["words"].startswith(
        "100.0 more than nobody (0.0; 95 % interval of the difference +"
    )
    worse = verdict.compare("everybody", best, none, truth)
    assert worse["words"].startswith("100.0 LESS than everybody") and worse["gain"] == -100
    same = verdict.compare("itself", best, best, truth)
    assert same["words"].endswith("+0.0 to +0.0: may be chance)")


STAGES = dict(
    predicted=dict(mask_iou=0.8, class_accuracy=0.7),
    kept=dict(mask_iou=0.9, class_accuracy=0.8),
    refined=dict(mask_iou=0.7, class_accuracy=0.8),
    corrected=dict(mask_iou=0.7, class_accuracy=0.85),
)


def test_stages_and_advice():
    said = verdict.stages(STAGES, None)
    assert said == [
        "SAM's masks made the pseudo-labels WORSE (mask iou 0.90 -> 0.70)",
        "the category correction made the pseudo-labels better (class accuracy 0.80 -> 0.85)",
    ]
    # Without hidden truth, what the validation images say.
    measured = dict(mask_iou=0.7, refined_iou=0.8)
    assert verdict.stages(None, measured) == [
        "SAM's masks are better than the teacher's (mask IoU 0.70 -> 0.80 on validation images)"
    ]
    measured = dict(mask_iou=0.7, refined_iou=0.71)
    assert verdict.stages(None, measured) == []
    measured |= dict(disagreements=12, classifier_right=3, teacher_right=8)
    assert verdict.stages(None, measured) == [
        "where category classifier and teacher disagree, the classifier is right 3 times, "
        "the teacher 8 times (on validation images)"
    ]
    plain, calibrated = (SimpleNamespace(filter=name) for name in ("score", "calibrated"))
    audit = dict(box_precision=0.9, class_accuracy=0.7, recall=0.2)
    advice = verdict.advice(plain, audit, STAGES, 1.0)
    assert advice == [
        "give --refine none, or --filter calibrated",
        "only 70% of those on an instance are named rightly, "
        "only 20% of the instances have a pseudo-label: pretrain longer, or label more",
    ]
    few = dict(audit, class_accuracy=0.9)
    wrong = dict(audit, recall=0.5)
    assert [verdict.advice(plain, one, STAGES, 1.0)[1] for one in (few, wrong)] == [
        "only 20% of the instances have a pseudo-label: pretrain longer, or lower --tau-class",
        "only 70% of those on an instance are named rightly: label more, or raise --tau-class",
    ]
    # A calibrated run has switched off what is worse, and has no threshold to set.
    for one in (few, wrong):
        (line,) = verdict.advice(calibrated, one, STAGES, 1.0)
        assert line.endswith("the thresholds by hand (--filter dual)")
    assert verdict.advice(plain, None, None, 1.0) == []
    # Class shares are not switched off by what is measured.
    shares = dict(STAGES, aligned=dict(mask_iou=0.7, class_accuracy=0.75))
    right = dict(audit, class_accuracy=0.9, recall=0.9)
    assert verdict.advice(calibrated, right, shares, 1.0) == ["give --no-align"]
    assert verdict.stages(shares, None)[2] == (
        "the alignment of class shares made the pseudo-labels WORSE (class accuracy 0.85 -> 0.75)"
    )
    best = "use best.pt, the best model on the validation part"
    assert verdict.advice(plain, None, None, -1.0) == ["lower --unsup-weight", best]
    alone = f"{best}, of this run or of the supervised one"
    assert verdict.advice(plain, None, None, -1.0, True)[-1] == alone
    # Also where something else is to be changed.
    assert verdict.advice(calibrated, right, shares, -1.0) == ["give --no-align", best]


def test_what_the_validation_images_say_where_there_is_no_audit():
    """Bare photos: the last calibration tells what is low."""
    measured = dict(precision=0.4, class_accuracy=0.3, recall=0.2)
    audit = verdict.measured(measured)
    assert audit == dict(box_precision=0.4, class_accuracy=0.3, recall=0.2)
    assert verdict.measured(None) is None
    (line,) = verdict.advice(SimpleNamespace(filter="calibrated"), audit, None, 1.0)
    assert line.startswith("only 40% of the pseudo-labels lie on an instance")


def test_a_supervised_run_beside_it_is_found(tmp_path):
    """Of the same labeled images, finished, as long as the run, and the strongest."""
    for name, method, steps, labeled, sha256 in (
        ("own", "full", 9, ["a"], "1"),
        ("other-split", "supervised", 9, ["b"], "1"),
        ("other-images", "supervised", 99, ["a"], "2"),
        ("short", "supervised", 5, ["a"], "1"),
        ("long", "supervised", 9, ["a"], "1"),
        ("pasted", "supervised", 9, ["a"], "1"),
        ("unfinished", "supervised", 99, ["a"], "1"),
    ):
        (tmp_path / name).mkdir()
        split = dict(labeled=labeled, sha256=sha256)
        (tmp_path / name / "labeled.json").write_text(json.dumps(split))
        (tmp_path / name / "checkpoint.pt").touch()
        if name != "unfinished":
            ap = dict(student=dict(long=20.0, short=30.0).get(name, 10.0))
            text = json.dumps(dict(method=method, steps=steps, val_mask_ap=ap))
            (tmp_path / name / "summary.json").write_text(text)
    # What is no run of ours is passed over.
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "summary.json").write_text("[]")
    (tmp_path / "list" / "labeled.json").write_text("[]")
    found = verdict.supervised_beside(tmp_path / "own", 9)
    assert found == tmp_path / "long" / "checkpoint.pt"
    (tmp_path / "alone").mkdir()
    assert verdict.supervised_beside(tmp_path / "alone", 9) is None
    assert verdict.supervised_beside(tmp_path / "own", 10) is None


def nobody_at(ap: float) -> tuple:
    """Numbers of a model, and no detection of it."""
    return dict(mask=dict(AP=ap)), []


def test_a_run_that_gained_for_certain_is_not_told_to_change(four, monkeypatch):
    """Whatever the audit says; one that may have gained by chance is."""
    audit = dict(box_precision=0.5, class_accuracy=0.5, recall=0.1)
    summary = dict(audit=audit, audit_stages=dict(end=None))
    config, everything = SimpleNamespace(filter="score"), perfect(four)
    best, nobody = (dict(mask=dict(AP=100.0)), everything), (dict(mask=dict(AP=0.0)), [])
    first = [(verdict.FIRST, *nobody)]
    assert verdict.verdict(config, summary, best, first, four)["advice"] == []
    # Without an interval, on many images, a clear gain is one as well.
    with monkeypatch.context() as patch:
        patch.setattr(verdict, "LARGE", 3)
        assert verdict.verdict(config, summary, best, first, four)["advice"] == []
        close = [(verdict.FIRST, *nobody_at(99.5))]
        assert verdict.verdict(config, summary, best, close, four)["advice"]
    # The images that chose the thresholds make nothing certain.
    made = verdict.verdict(config, dict(summary, test_is_validation=True), best, first, four)
    assert made["advice"] and made["sentence"].endswith("which are no test")
    assert "a run with --method supervised is fairer" in made["sentence"]
    # Better than the first teacher, worse than the labels alone.
    beside = ("supervised training in x", *best)
    lost = verdict.verdict(config, summary, nobody_at(50.0), [*first, beside], four)
    assert "fairer" not in lost["sentence"]
    assert lost["advice"][-1].endswith("of this run or of the supervised one")
    first = [(verdict.FIRST, *best)]
    assert len(verdict.verdict(config, summary, best, first, four)["advice"]) == 1
