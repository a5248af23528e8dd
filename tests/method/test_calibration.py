"""Calibration: each measured number by hand, and thresholds, gate and trust put to use."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, dataset_of

import train
from ssis import calibration, correction, filters, presets
from ssis.alignment import Alignment
from ssis.calibration import GATES, OFF, SHARED, TRIED, Instances
from ssis.engine import run_folder
from ssis.io import checkpoint

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
    columns = {**usual, **{k: torch.as_tensor(v) for k, v in columns.items()}}
    # Where nothing else is said, the category classifier says the same of SAM's mask.
    return Instances(**dict(refined_opinion=columns["opinion"]) | columns)


@fast
def test_thresholds_are_the_equation_in_loops():
    """ssis Eq. (F1), each class and threshold by itself."""
    generator = torch.Generator().manual_seed(1)
    quality = torch.rand(60, generator=generator)
    found = torch.rand(60, generator=generator) < quality
    labels = torch.randint(1, 3, (60,), generator=generator)
    true = torch.where(found, 3 - labels, 0)  # found, whatever the class
    instances = torch.tensor([25, 40])
    given = seen(labels=labels, foreground=quality, true_labels=true)
    measured = calibration.found_thresholds(given, instances).tolist()
    for k in (1, 2):
        best = {}
        for threshold in TRIED.tolist():
            f = n = f_all = n_all = 0
            for q, is_found, label in zip(quality, found, labels, strict=True):
                if q >= threshold:
                    f, n = f + bool(is_found and label == k), n + bool(label == k)
                    f_all, n_all = f_all + bool(is_found), n_all + 1
            share = SHARED / 65
            above = 2 * (f + share * f_all)
            below = n + instances[k - 1].item() + share * (n_all + 65)
            best.setdefault(round(above / below, 6), []).append(threshold)
        highest = best[max(best)]
        assert measured[k - 1] == pytest.approx(highest[(len(highest) - 1) // 2])


@fast
def test_found_thresholds_by_hand():
    """Class 1: a hundred that lie on an instance, whatever its class. Class 2: on none."""
    labels = torch.tensor([1] * 100 + [2] * 100)
    quality = torch.tensor([0.605] * 100 + [0.805] * 100)
    true = torch.tensor([1, 3] * 50 + [0] * 100)
    both = seen(labels=labels, foreground=quality, true_labels=true)
    instances = torch.tensor([50, 0, 50])
    first, second, third = calibration.found_thresholds(both, instances).tolist()
    # Class 1: every threshold up to 0.6 keeps all hundred; the middle of 0.3 to 0.6.
    assert first == pytest.approx(0.45)
    # Class 2 has no instance: what counts is all classes together, where 0.6 keeps half that is
    # right. A class that was not predicted is held to the same.
    assert second == third == pytest.approx(0.45)
    # False ones below all true ones: the threshold lies between.
    low = seen(foreground=[0.405] * 9 + [0.805] * 9, true_labels=[0] * 9 + [1] * 9)
    found = calibration.found_thresholds(low, torch.tensor([9, 0])).tolist()
    assert found == pytest.approx([0.6, 0.6])


@fast
def test_without_predictions_or_instances_there_is_a_threshold():
    nothing = seen(labels=torch.zeros(0, dtype=torch.int64))
    middle = TRIED.median().item()
    for instances in (torch.tensor([3, 4]), torch.tensor([0, 0])):
        assert calibration.found_thresholds(nothing, instances).tolist() == [middle] * 2
    assert calibration.mask_threshold(nothing) == middle
    assert calibration.best_gate(nothing) == OFF and calibration.best_trust(nothing) == 0.0


@fast
def test_the_threshold_of_masks_looks_at_found_instances_alone():
    quality = torch.tensor([0.705] * 50 + [0.905] * 50 + [0.955] * 50)
    iou = torch.tensor([0.3] * 50 + [0.9] * 50 + [0.0] * 50)
    true = torch.tensor([1] * 100 + [0] * 50)
    columns = dict(mask_quality=quality, mask_iou=iou, true_labels=true)
    # The last fifty lie on no instance: whether their masks are right is not the question. The
    # middle of what lies between 0.705 and 0.905.
    assert calibration.mask_threshold(seen(**columns)) == pytest.approx(0.8)


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
    """Where the true classes are most likely: one half at most, none, or between."""
    teacher = torch.tensor([[0.8, 0.2], [0.9, 0.1], [0.6, 0.4]])
    opinion = torch.tensor([[0.1, 0.9], [0.1, 0.9], [0.1, 0.9]])
    of = dict(distribution=teacher, opinion=opinion)
    assert calibration.best_trust(seen(true_labels=[2, 2, 2], **of)) == 0.5
    assert calibration.best_trust(seen(true_labels=[1, 1, 1], **of)) == 0.0
    # One right each: (0.2 + 0.7 w)(0.9 - 0.8 w) is largest at w = 0.42.
    assert calibration.best_trust(seen(true_labels=[2, 1, 0], **of)) == pytest.approx(0.4)
    # A teacher that gives the true class no chance at all pays most of it.
    sure = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    of = dict(distribution=sure, opinion=torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    assert calibration.best_trust(seen(true_labels=[1, 2], **of)) == 0.5
    # The scale is no probability of background: 0.3 : 0.1 counts as 0.75 : 0.25.
    half = dict(distribution=[[0.3, 0.1]], opinion=[[0.7, 0.3]], true_labels=[1])
    assert calibration.best_trust(seen(**half)) == 0.0


@fast
def test_what_is_measured_is_put_to_use():
    """Thresholds into PL-DC's, gate and trust beside them; and the numbers of the report."""
    labeler = SimpleNamespace(
        thresholds=filters.Thresholds(2, (0.5, 0.9), (0.5, 0.9), 0.99),
        calibration=calibration.Calibration(0.5),
        alignment=Alignment(torch.tensor([29, 9])),
    )
    columns = dict(
        labels=[1] * 20, foreground=[0.95] * 20, true_labels=[1] * 18 + [2, 0],
        distribution=[[1.0, 0.0]] * 20, opinion=[[1.0, 0.0]] * 17 + [[0.0, 1.0]] * 3,
        mask_iou=[0.8] * 19 + [0.0], refined_iou=[0.9] * 19 + [0.0],
    )  # fmt: skip
    measured = calibration.calibrate(labeler, seen(**columns), 10, torch.tensor([30, 8]))
    stored = labeler.thresholds.values[0].tolist()
    assert stored == pytest.approx(measured["found_thresholds"])
    assert labeler.calibration.gate == 0.0 and measured["gate"] == 0.0 and measured["taken"] == 1
    assert measured["kept"] == 20 and measured["precision"] == 0.95
    assert measured["recall"] == 0.5 and measured["class_accuracy"] == pytest.approx(
        18 / 19, abs=1e-4
    )
    assert measured["mask_iou"] == 0.8 and measured["refined_iou"] == 0.9
    # Two found ones are disputed: one is of class 1, one of class 2.
    disputed = ("disagreements", "classifier_right", "teacher_right")
    assert [measured[key] for key in disputed] == [2, 1, 1]
    # Class shares are said as soon as something was named.
    measured["step"] = 7
    line = run_folder.calibration_line(measured, ["cat", "dog"], True)
    assert "class shares" not in line
    labeler.alignment.named.copy_(torch.tensor([0.9, 0.1]))
    measured = calibration.calibrate(labeler, seen(**columns), 10, torch.tensor([30, 8]))
    line = run_folder.calibration_line(dict(measured, step=7), ["cat", "dog"], True)
    # 29.5 and 9.5 of 39.
    said = "cat is the farthest off, 90% of the pseudo-labels, 76% of what is annotated"
    assert line.endswith(said)
    again = calibration.Calibration(1.0)
    again.load_state_dict(labeler.calibration.state_dict())
    assert (again.gate, again.trust) == (0.0, 0.5)


@fast
@pytest.mark.parametrize(
    ("ours", "theirs", "most"), [(4, 0, 0.5), (5, 0, 1.0), (10, 3, 0.5), (11, 3, 1.0), (3, 11, 0.4)]
)
def test_to_overrule_the_teacher_has_to_be_earned(ours, theirs, most):
    """The teacher is sure, the classifier less so, and its weight would be 1 in any case."""
    count = ours + theirs
    of = dict(
        labels=[1] * count, distribution=[[1.0, 0.0]] * count, opinion=[[0.45, 0.55]] * count,
        true_labels=[2] * ours + [1] * theirs,
    )  # fmt: skip
    assert calibration.best_trust(seen(**of)) == pytest.approx(most)
    # Said where the limit is what decides.
    measured = dict(
        step=7, images=10, found_thresholds=[0.5], precision=None, disagreements=count,
        classifier_right=ours, teacher_right=theirs, trust=most,
    )  # fmt: skip
    line = run_folder.calibration_line(measured, ["cat"], False)
    assert line.endswith(
        f"weight {most:.1f}" + " (no more, for it is not clearly the better one)" * (most == 0.5)
    )
    # Agreement counts for nothing, however often it is right.
    agreed = seen(
        **of | dict(true_labels=[2] * count, distribution=[[0.0, 1.0]] * count, labels=[2] * count)
    )
    assert calibration.disputed(agreed) == (0, 0, 0)


@fast
@pytest.mark.parametrize(("refined", "trust"), [(0.9, 1.0), (0.7, 0.0)])
def test_the_classifier_is_trusted_for_the_masks_that_it_will_see(refined, trust):
    """Right under SAM's masks, wrong under the teacher's: SAM's better masks are taken."""
    labeler = SimpleNamespace(
        thresholds=filters.Thresholds(2, (0.5, 0.9), (0.5, 0.9), 0.99),
        calibration=calibration.Calibration(0.5), alignment=None,
    )  # fmt: skip
    columns = dict(
        true_labels=[2] * 20, distribution=[[0.7, 0.3]] * 20, opinion=[[0.9, 0.1]] * 20,
        refined_opinion=[[0.1, 0.9]] * 20, refined_iou=[refined] * 20,
    )  # fmt: skip
    measured = calibration.calibrate(labeler, seen(**columns), 10, torch.tensor([0, 20]))
    assert (measured["gate"] < calibration.OFF) == (refined > 0.8)
    assert measured["trust"] == labeler.calibration.trust == trust
    assert measured["classifier_right"] == (20 if refined > 0.8 else 0)


@fast
def test_a_measured_weight_is_not_faded_out():
    assert correction.weight(5, 10, 30) == 0.5 and correction.weight(5, 10, 30, 0.2) == 0.2
    assert correction.weight(20, 10, 30) == pytest.approx(0.25)
    assert correction.weight(20, 10, 30, 0.8) == 0.8 and correction.weight(30, 10, 30, 0.0) == 0


@pytest.mark.parametrize("classifier", ["prototypes", "imagenet"])
def test_a_calibrated_run_resumes_bit_identical(
    classifier, shapes_folder, few, tmp_path, monkeypatch
):
    """Thresholds, gate, trust and memory are in the checkpoint; SAM and classifier are asked."""
    monkeypatch.setattr(correction, "START_VIEWS", 16)
    # A teacher of four steps is sure of nothing.
    for module in (calibration, filters):
        monkeypatch.setattr(module, "LOWEST", 0.02)
    monkeypatch.setattr(calibration, "TRIED", torch.arange(0.02, 0.995, 0.01))
    monkeypatch.setattr(calibration, "GATES", torch.zeros(1))
    given = [*TINY, *dataset_of(shapes_folder), "--method", "full", "--filter", "calibrated"]
    given += ["--arp", "both", "--lr-after", "0.5", "--align"]
    if classifier == "imagenet":
        timm = pytest.importorskip("timm", reason="timm is not installed")
        weights = tmp_path / "weights.pth"
        torch.save(timm.create_model("resnet10t").state_dict(), weights)
        given += ["--model", "timm", "--backbone", "resnet10t", "--backbone-weights", str(weights)]
        given += ["--correction", "imagenet"]
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
    ends = [checkpoint.load(str(tmp_path / name / "checkpoint.pt")) for name in ("once", "often")]
    for part in ("student", "teacher", "classifier", "thresholds", "alignment"):
        assert ends[0][part].keys() == ends[1][part].keys() and ends[0][part]
        assert all(torch.equal(v, ends[1][part][k]) for k, v in ends[0][part].items()), part
    assert ends[0]["classifier"]["seen"].sum() > 8
    assert one["best"] == two["best"] and one["verdict"]["compared"] == two["verdict"]["compared"]
    # After pretraining (4), at the end of the burn-in (7, an evaluation as well).
    assert [measured["step"] for measured in one["calibration"]] == [4, 7]
    assert one["calibration"][0]["images"] == 6
    if classifier == "imagenet":
        return  # with a backbone of random weights, nothing is found in four steps
    assert one["calibration"][0]["kept"] > 0
    # All of it is at work: the student is taught something, and SAM has been asked.
    assert one["audit"]["pseudo_per_image"] > 0
    stages = one["audit_stages"]["end of burn-in"]
    assert list(stages)[:2] == ["predicted", "kept"] and stages["kept"]["pseudo_per_image"] > 0
    assert list(stages)[-2:] == ["aligned", "final"]
    # It is expected as it is annotated, on the labeled and on the validation images, and
    # after eight steps more than nothing was named.
    kept = ends[0]["alignment"]
    files = (shapes_folder / f"instances_{part}.json" for part in ("train", "val"))
    truths = [json.loads(file.read_text()) for file in files]
    chosen = json.loads((tmp_path / "once" / "labeled.json").read_text())["labeled"]
    ids = {i["id"] for i in truths[0]["images"] if i["file_name"] in chosen}
    records = [a for a in truths[0]["annotations"] if a["image_id"] in ids]
    records += truths[1]["annotations"]
    order = sorted(c["id"] for c in truths[0]["categories"])
    counts = torch.tensor([1 / 6 + sum(a["category_id"] == k for a in records) for k in order])
    torch.testing.assert_close(kept["shares"], counts / counts.sum())
    assert not torch.equal(kept["named"], kept["shares"])
    assert "Calibration on the validation images" in (tmp_path / "once/report.html").read_text()


def test_presets_that_calibrate_name_no_paper():
    """`s4m` and Guided Distillation on photographs stay without this project's parts."""
    for method in ("guided-distillation", "s4m"):
        assert presets.switches("photos", method, "timm")["filter"] == "score"
