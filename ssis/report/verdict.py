r"""The verdict: what the unlabeled images brought, and what to change.

A run ends with a sentence. It compares the final teacher with the first one, which has
seen labeled images alone, and with a supervised run of the same labeled images where
one lies beside it, both on the test images. A few hundred test images are a sample, and
so the sentence has an interval: the images are drawn anew, with replacement, many
times; each time both models' AP is computed on the same drawn images (a *paired
bootstrap*), and 95 % of the differences lie in the interval. It says how sure the
difference is for these two models, not what another seed would give.

Then, stage by stage, whether SAM, category classifier and alignment made the
pseudo-labels better or worse, measured on unlabeled images whose ground truth is hidden
from training (`ssis/report/audit.py`). Without such ground truth it is what was
measured on the validation images (`ssis/calibration.py`): SAM's masks, and who is right
where classifier and teacher disagree.

Read next: `ssis/report/page.py`, where it stands at the top.
"""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ssis.report.ap import USUAL
from ssis.report.audit import FLAGS

# Draws. Above LARGE = images x classes they would take minutes, and the interval is
# narrow anyway: there, a gain of 1 AP is taken for certain.
DRAWS = 300
LARGE = 20_000
# What the final teacher is compared with in every run.
FIRST = "the first teacher"
# A stage changed something if a fraction moved by more than this.
NOTABLE = 0.02


def evaluated(ground_truth: COCO, results: list[dict], limit: int = USUAL) -> COCOeval:
    """The matches of a model's masks with the ground truth, of all sizes.

    Args:
        ground_truth: of `Dataset.coco`.
        results: of `ap.predictions`.
        limit: detections of an image and class that count.
    """
    keys = ("image_id", "category_id", "score", "segmentation")
    with contextlib.redirect_stdout(io.StringIO()):
        detections = COCO()
        detections.dataset = dict(ground_truth.dataset, annotations=[])
        if results:
            detections = ground_truth.loadRes(
                [{k: r[k] for k in keys} for r in results]
            )
        else:
            detections.createIndex()
        matches = COCOeval(ground_truth, detections, "segm")
        # AP over all sizes alone, which is a quarter of the work.
        matches.params.areaRng, matches.params.areaRngLbl = [[0, 1e10]], ["all"]
        matches.params.maxDets = [limit]
        matches.evaluate()
    return matches


def resampled_ap(matches: COCOeval, rows: np.ndarray) -> float:
    """Mask AP, in percent, on some of the images, which may come more than once.

    Args:
        matches: of `evaluated`.
        rows: numbers of images, in the order of their ids.
    """
    images, classes = len(matches.params.imgIds), len(matches.params.catIds)
    drawn = COCOeval(iouType="segm")
    drawn.params = matches.params
    drawn._paramsEval = matches._paramsEval
    # pycocotools lists its matches class by class, and within a class by image.
    drawn.evalImgs = [
        matches.evalImgs[k * images + row] for k in range(classes) for row in rows
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        drawn.accumulate()
    precision = drawn.eval["precision"]
    known = precision[precision > -1]
    # A draw may have no instance at all.
    return 100 * float(known.mean()) if known.size else float("nan")


def paired_interval(
    ground_truth: COCO,
    before: list[dict],
    after: list[dict],
    limit: int = USUAL,
    seed: int = 0,
) -> tuple[float, float] | None:
    """The 95 % interval of the difference of two models' mask AP.

    Args:
        ground_truth: of `Dataset.coco`.
        before, after: results of the two models, of `ap.predictions`.
        limit: detections of an image and class that count.
        seed: of the drawing.

    Returns:
        Its ends, in percent; None for a dataset so large that it would take minutes.
    """
    images = len(ground_truth.getImgIds())
    if images * len(ground_truth.getCatIds()) > LARGE:
        return None
    both = [evaluated(ground_truth, each, limit) for each in (before, after)]
    random = np.random.default_rng(seed)
    gains = []
    for _ in range(DRAWS):
        rows = random.integers(images, size=images)
        old, new = (resampled_ap(matches, rows) for matches in both)
        gains.append(new - old)
    low, high = np.nanpercentile(gains, [2.5, 97.5])
    return round(float(low), 2), round(float(high), 2)


def compare(
    name: str, before: tuple, after: tuple, ground_truth: COCO, limit: int = USUAL
) -> dict:
    """The final teacher beside another model.

    Args:
        name: of the other model.
        before, after: numbers and results of the other model and of the final teacher,
            of `ap.evaluate`.
        ground_truth: of `Dataset.coco`.
        limit: detections of an image and class that count.

    Returns:
        name, ap (of the other), gain and interval, in percent, and words.
    """
    old, new = before[0]["mask"]["AP"], after[0]["mask"]["AP"]
    gain = round(new - old, 3)
    interval = paired_interval(ground_truth, before[1], after[1], limit)
    words = f"{abs(gain):.1f} {'more' if gain >= 0 else 'LESS'} than {name} ({old:.1f}"
    if interval:
        low, high = interval
        words += f"; 95 % interval of the difference {low:+.1f} to {high:+.1f}"
        words += ": may be chance" if low <= 0 <= high else ""
    return dict(name=name, ap=old, gain=gain, interval=interval, words=words + ")")


def stages(audit: dict | None, calibration: dict | None) -> list[str]:
    """What each stage made of the pseudo-labels, a sentence each.

    Args:
        audit: stage -> numbers, of `audit.measure`, or None without.
        calibration: the last of `calibration.calibrate`, or None.
    """
    lines = []
    for stage, key, what in (
        ("refined", "mask_iou", "SAM's masks"),
        ("corrected", "class_accuracy", "the category correction"),
        ("aligned", "class_accuracy", "the alignment of class shares"),
    ):
        if audit and (moved := change(audit, stage, key)):
            word = "better" if moved[1] > moved[0] else "WORSE"
            lines.append(
                f"{what} made the pseudo-labels {word} ({key.replace('_', ' ')} "
                f"{moved[0]:.2f} -> {moved[1]:.2f})"
            )
    if not audit and calibration and calibration["refined_iou"] is not None:
        old, new = calibration["mask_iou"], calibration["refined_iou"]
        if abs(new - old) > NOTABLE:
            word = "better" if new > old else "WORSE"
            lines.append(
                f"SAM's masks are {word} than the teacher's (mask IoU {old:.2f} -> "
                f"{new:.2f} on validation images)"
            )
    if not audit and calibration and calibration.get("disagreements"):
        lines.append(
            f"where category classifier and teacher disagree, the classifier is right "
            f"{calibration['classifier_right']} times, the teacher "
            f"{calibration['teacher_right']} times (on validation images)"
        )
    return lines


def advice(
    config, audit: dict | None, stages: dict | None, gain: float, alone: bool = False
) -> list[str]:
    """What to change, a sentence each.

    Args:
        config: the settings of the run.
        audit, stages: of the summary, at the end of the run.
        gain: the smallest over what the run is compared with, AP.
        alone: whether that is a supervised run, and not the first teacher.

    Returns:
        Lines; `verdict` asks for none where the gain is certain.
    """
    lines, stages, audit = [], stages or {}, audit or {}
    calibrated = config.filter == "calibrated"
    for stage, key, flags in (
        ("refined", "mask_iou", "--refine none, or --filter calibrated"),
        ("corrected", "class_accuracy", "--correction none, or --filter calibrated"),
        ("aligned", "class_accuracy", "--no-align"),
    ):
        moved = change(stages, stage, key)
        # What is measured is off where it looked worse; the alignment is not measured.
        if moved and moved[1] < moved[0] and not (calibrated and stage != "aligned"):
            lines.append(f"give {flags}")
    low = [
        (key, f"only {audit[key]:.0%} {what}", mend)
        for key, least, what, mend in (
            ("box_precision", 0.8, "of the pseudo-labels lie on an instance", "raise"),
            (
                "class_accuracy",
                0.8,
                "of those on an instance are named rightly",
                "label more, or raise",
            ),
            (
                "recall",
                0.3,
                "of the instances have a pseudo-label",
                "pretrain longer, or lower",
            ),
        )
        if audit.get(key) is not None and audit[key] < least
    ]
    if len(low) > 1 and low[-1][0] == "recall":
        # Too few, and wrong as well: no threshold mends both.
        facts = ", ".join(fact for _, fact, _ in low)
        lines.append(f"{facts}: pretrain longer, or label more")
    else:
        thresholds = FLAGS[config.filter]
        lines += [f"{fact}: {mend} {thresholds}" for _, fact, mend in low]
    if gain < 0:
        lines += [] if lines else ["lower --unsup-weight"]
        lines.append("use best.pt, the best model on the validation part")
        if alone:
            lines[-1] += ", of this run or of the supervised one"
    return lines


def change(stages: dict, stage: str, key: str) -> tuple[float, float] | None:
    """How a stage moved a number of the audit: before and after; None for not much.

    Args:
        stages: stage -> numbers, in their order.
        stage, key: which.
    """
    names = list(stages)
    if stage not in names:
        return None
    before, after = stages[names[names.index(stage) - 1]][key], stages[stage][key]
    if before is None or after is None or abs(after - before) <= NOTABLE:
        return None
    return before, after


def supervised_beside(folder: Path, steps: int) -> Path | None:
    """The checkpoint of a finished supervised run in a folder beside a run's.

    It must have had the same labeled images and at least as many steps, or it would be
    no fair line to beat. Of several, the one with the highest validation AP at its end.
    """
    found = []
    for path in folder.parent.glob("*/summary.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            summary = json.loads(path.read_text(encoding="utf-8"))
            labeled = [
                json.loads((place / "labeled.json").read_text(encoding="utf-8"))
                for place in (path.parent, folder)
            ]
            # The same images of the same list of images.
            keys = ("labeled", "sha256")
            same = all(labeled[0][key] == labeled[1][key] for key in keys)
            checkpoint = path.with_name("checkpoint.pt")
            fair = summary["method"] == "supervised" and summary["steps"] >= steps
            if fair and same and checkpoint.exists():
                ap = (summary.get("val_mask_ap") or {}).get("student") or 0.0
                found.append((ap, str(checkpoint)))
    return Path(max(found)[1]).resolve() if found else None


def verdict(
    config, summary: dict, now: tuple, others: list[tuple], test_set, limit: int = USUAL
) -> dict:
    """The verdict of a run.

    Args:
        config: its settings.
        summary: `summary.json`, but for the verdict.
        now: numbers and results of the final teacher on the test part.
        others: name, numbers and results of what it is compared with, the first
            teacher first.
        test_set: `datasets.dataset.Dataset`.
        limit: detections of an image and class that count.

    Returns:
        sentence, compared (of `compare`), stages and advice.
    """
    ap = now[0]["mask"]["AP"]
    if ap is None or not others:
        return dict(
            sentence="nothing to compare with", compared=[], stages=[], advice=[]
        )
    truth = test_set.coco(range(len(test_set)))
    compared = [compare(name, (n, r), now, truth, limit) for name, n, r in others]
    ends = summary["audit_stages"]["end"]
    calibrations = summary.get("calibration") or [None]
    worst = min(compared, key=lambda one: one["gain"])
    # Never change a winning run. On images that also set thresholds none is certain.
    certain = not summary.get("test_is_validation") and all(
        c["interval"][0] > 0 if c["interval"] else c["gain"] > 1 for c in compared
    )
    sentence = f"with the unlabeled images the final teacher has mask AP {ap:.1f}: "
    sentence += "; ".join(one["words"] for one in compared)
    if [one["name"] for one in compared] == [FIRST]:
        sentence += "; it had fewer steps: a run with --method supervised is fairer"
    if summary.get("test_is_validation"):
        sentence += "; on the validation images, which are no test"
    audit = summary["audit"] or measured(calibrations[-1])
    return dict(
        sentence=sentence,
        compared=compared,
        stages=stages(ends, calibrations[-1]),
        advice=[]
        if certain
        else advice(config, audit, ends, worst["gain"], worst["name"] != FIRST),
    )


def measured(calibration: dict | None) -> dict | None:
    """What the validation images say of kept pseudo-labels, where there is no audit."""
    if not calibration:
        return None
    return dict(
        box_precision=calibration["precision"],
        class_accuracy=calibration["class_accuracy"],
        recall=calibration["recall"],
    )
