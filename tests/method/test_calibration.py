"""Calibration: each measured number by hand, and thresholds, gate and trust put to use."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, dataset_of

import train
from ssis import calibration, correction, filters, presets
from ssis.calibration import GATES, IMAGINED, OFF, TRIED, Instances

fast = pytest.mark.fast


def seen(**columns) -> Instances:
    """Instances of which some columns are given: by default right, sure, and nobody asked."""
    n = len(next(iter(columns.values())))
    usual = dict(
        labels=torch.ones(n, dtype=torch.int64), foreground=torch.ones(n),
        mask_quality=torch.ones(n), true_labels=torch.ones(n, dtype=torch.int64),
        mask_iou=torch.full((n,), 0.8), agreement=torch.ones(n),
        refined_iou=torch.full((n,), 0.8), distribution=torch.tensor([[1.0, 0.0]]).repeat(n, 1),
        opinion=torch.zeros(n, 2),
    )  # fmt: skip
    return Instances(**{**usual, **{k: torch.as_tensor(v) for k, v in columns.items()}})


@fast
def test_precision_is_the_equation_in_loops():
    """Also with nobody above a threshold: then it is what was imagined."""
    generator = torch.Generator().manual_seed(1)
    quality = torch.rand(30, generator=generator) * 0.9
    right = torch.rand(30, generator=generator) < quality
    found = calibration.precision(quality, right, TRIED)
    for k, threshold in enumerate(TRIED.tolist()):
        above = [bool(r) for q, r in zip(quality, right, strict=True) if q >= threshold]
        expected = (sum(above) + IMAGINED * threshold) / (len(above) + IMAGINED)
        assert found[k].item() == pytest.approx(expected, abs=1e-6)
    assert found[-1] == pytest.approx(TRIED[-1].item())


@fast
def test_found_thresholds_by_hand():
    """Class 1: a hundred that lie on an instance, whatever its class. Class 2: on none."""
    labels = torch.tensor([1] * 100 + [2] * 100)
    quality = torch.tensor([0.6] * 100 + [0.8] * 100)
    true = torch.tensor([1, 3] * 50 + [0] * 100)
    both = seen(labels=labels, foreground=quality, true_labels=true)
    first, second, third = calibration.found_thresholds(both, 3, 0.9).tolist()
    # Class 1 at T = 0.6 or below: (100 + 10 pi) / 110, with pi near one half: above 0.9.
    assert first == pytest.approx(0.3)
    # Class 2 is never found above 0.8; beyond that only the imagined ones are left.
    assert second == pytest.approx(0.9)
    # A class that was not seen has the threshold of all, and so has nothing below 0.8.
    assert third == pytest.approx(0.9)


@fast
def test_without_predictions_the_score_is_believed():
    nothing = seen(labels=torch.zeros(0, dtype=torch.int64))
    assert calibration.found_thresholds(nothing, 2, 0.85).tolist() == pytest.approx([0.85, 0.85])
    assert calibration.mask_threshold(nothing, 0.85) == pytest.approx(0.85)
    assert calibration.best_gate(nothing) == OFF and calibration.best_trust(nothing) == 0.0


@fast
def test_the_threshold_of_masks_looks_at_found_instances_alone():
    quality = torch.tensor([0.7] * 50 + [0.9] * 50 + [0.95] * 50)
    iou = torch.tensor([0.3] * 50 + [0.9] * 50 + [0.0] * 50)
    true = torch.tensor([1] * 100 + [0] * 50)
    columns = dict(mask_quality=quality, mask_iou=iou, true_labels=true)
    # The last fifty lie on no instance: whether their masks are right is not the question.
    assert calibration.mask_threshold(seen(**columns), 0.9) == pytest.approx(0.71)


@fast
def test_gate_by_hand():
    """SAM is better where it agrees (0.8 and more) and worse where it does not (0.4)."""
    agreement = torch.tensor([0.9, 0.8, 0.85, 0.4, 0.3])
    refined = torch.tensor([0.95, 0.9, 0.9, 0.2, 0.1])
    gate = calibration.best_gate(seen(agreement=agreement, refined_iou=refined))
    # All gates between 0.4 and 0.8 gain the same; the first of them is taken.
    assert gate == pytest.approx(GATES[GATES > 0.4][0].item())
    # Worse everywhere: off. Better by chance: one instance of many.
    worse = seen(agreement=agreement, refined_iou=torch.full((5,), 0.7))
    assert calibration.best_gate(worse) == OFF
    chance = torch.full((100,), 0.8)
    chance[0] = 0.9
    assert calibration.best_gate(seen(refined_iou=chance)) == OFF
    assert calibration.best_gate(seen(refined_iou=torch.linspace(0.8, 0.9, 100))) < 1


@fast
def test_trust_by_hand():
    """Sure both: with 0.5 the argmax takes the teacher's class; unsure: any weight decides."""
    teacher = torch.tensor([[0.55, 0.45], [0.9, 0.1], [0.6, 0.4]])
    opinion = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    of = dict(distribution=teacher, opinion=opinion)
    # Right about the first alone: a weight of 0.1 mixes it to 0.495 : 0.505, and leaves the rest.
    assert calibration.best_trust(seen(true_labels=[2, 1, 1], **of)) == pytest.approx(0.1)
    # About the first and the third: 0.2 mixes that to 0.48 : 0.52.
    assert calibration.best_trust(seen(true_labels=[2, 1, 2], **of)) == pytest.approx(0.2)
    # About all: half each mixes the second to 0.45 : 0.55. About none: not asked. More than
    # half where the teacher is surer.
    assert calibration.best_trust(seen(true_labels=[2, 2, 2], **of)) == pytest.approx(0.5)
    assert calibration.best_trust(seen(true_labels=[1, 1, 1], **of)) == 0.0
    sure = dict(
        distribution=torch.tensor([[0.95, 0.05]] * 3), opinion=torch.tensor([[0.15, 0.85]] * 3)
    )
    assert calibration.best_trust(seen(true_labels=[2, 2, 2], **sure)) == pytest.approx(0.6)
    # What lies on no instance has no class to be right about.
    assert calibration.best_trust(seen(true_labels=[2, 0, 1], **of)) == pytest.approx(0.1)


@fast
def test_what_is_measured_is_put_to_use():
    """Thresholds into PL-DC's, gate and trust beside them; and the numbers of the report."""
    labeler = SimpleNamespace(
        thresholds=filters.Thresholds(2, (0.5, 0.9), (0.5, 0.9), 0.99),
        calibration=calibration.Calibration(0.5),
    )
    columns = dict(
        labels=[1] * 20, foreground=[0.95] * 20, true_labels=[1] * 18 + [2, 0],
        distribution=[[1.0, 0.0]] * 20, opinion=[[1.0, 0.0]] * 17 + [[0.0, 1.0]] * 3,
        mask_iou=[0.8] * 19 + [0.0], refined_iou=[0.9] * 19 + [0.0],
    )  # fmt: skip
    looked = (seen(**columns), 10, 38)
    measured = calibration.calibrate(labeler, looked, 0.5)
    stored = labeler.thresholds.values[0].tolist()
    assert stored == pytest.approx(measured["found_thresholds"])
    assert labeler.calibration.gate == 0.0 and measured["gate"] == 0.0
    assert measured["kept"] == 20 and measured["precision"] == 0.95
    assert measured["recall"] == 0.5 and measured["class_accuracy"] == pytest.approx(
        18 / 19, abs=1e-4
    )
    assert measured["mask_iou"] == 0.8 and measured["refined_iou"] == 0.9
    # Two found ones are disputed: one is of class 1, one of class 2.
    disputed = ("disagreements", "classifier_right", "teacher_right")
    assert [measured[key] for key in disputed] == [2, 1, 1]
    again = calibration.Calibration(1.0)
    again.load_state_dict(labeler.calibration.state_dict())
    assert (again.gate, again.trust) == (0.0, 0.0)


@fast
def test_a_measured_weight_is_not_faded_out():
    assert correction.weight(5, 10, 30) == 0.5 and correction.weight(5, 10, 30, 0.2) == 0.2
    assert correction.weight(20, 10, 30) == pytest.approx(0.25)
    assert correction.weight(20, 10, 30, 0.8) == 0.8 and correction.weight(30, 10, 30, 0.0) == 0


def test_a_calibrated_run_resumes_bit_identical(shapes_folder, few, tmp_path, monkeypatch):
    """Thresholds, gate and trust are in the checkpoint; SAM and the prototypes are measured."""
    monkeypatch.setattr(correction, "START_VIEWS", 16)
    # A teacher of four steps is sure of nothing.
    for module in (calibration, filters):
        monkeypatch.setattr(module, "LOWEST", 0.02)
    monkeypatch.setattr(calibration, "TRIED", torch.arange(0.02, 0.995, 0.01))
    monkeypatch.setattr(calibration, "GATES", torch.zeros(1))
    given = [*TINY, *dataset_of(shapes_folder), "--method", "full", "--filter", "calibrated"]
    given += ["--target-precision", "0.01", "--ignore-uncertain", "--arp", "both"]
    given += ["--lr-after", "0.5"]
    train_step, stops = train.train_step, []

    def step_and_stop(*arguments):
        result = train_step(*arguments)
        if arguments[4] + 1 in stops:
            signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(train, "train_step", step_and_stop)
    summaries = []
    for name, when in (("once", []), ("often", [5, 9])):
        stops[:] = when
        for _ in range(len(when) + 1):
            train.main([*given, "--output", str(tmp_path / name)])
        summaries.append(json.loads((tmp_path / name / "summary.json").read_text()))
    one, two = summaries
    assert one["mask_ap"] == two["mask_ap"] and one["calibration"] == two["calibration"]
    assert one["best"] == two["best"] and one["verdict"]["compared"] == two["verdict"]["compared"]
    # After pretraining (4), at the end of the burn-in (7, an evaluation as well).
    assert [measured["step"] for measured in one["calibration"]] == [4, 7]
    assert one["calibration"][0]["images"] == 6 and one["calibration"][0]["kept"] > 0
    # All of it is at work: the student is taught something, and SAM has been asked.
    assert one["audit"]["pseudo_per_image"] > 0
    stages = one["audit_stages"]["end of burn-in"]
    assert list(stages)[:2] == ["predicted", "kept"] and stages["kept"]["pseudo_per_image"] > 0
    assert "Calibration on the validation images" in (tmp_path / "once/report.html").read_text()


def test_presets_that_calibrate_name_no_paper():
    """`s4m` and Guided Distillation on photographs stay without this project's parts."""
    for method in ("guided-distillation", "s4m"):
        assert presets.switches("photos", method, "timm")["filter"] == "score"
