"""Evaluation: AP of a model, and what an evaluation leaves behind.

Claims: perfect predictions score 100 and none 0; a class without instances has no AP; the saved
files give the same AP to pycocotools alone; sizes go by masks; detections lie in the original
frame; boundary AP is that of the paper; memory goes back to the system.
"""

import contextlib
import io
import json
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, real
from helpers import error_of
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import evaluate
from ssis import UserError, networks
from ssis.datasets import coco_json, rle
from ssis.report import ap

pytestmark = pytest.mark.fast


def perfect(dataset) -> list[dict]:
    results = []
    for index in range(len(dataset)):
        for a in dataset.coco([index]).dataset["annotations"]:
            if not a["iscrowd"]:
                mask = mask_utils.decode(a["segmentation"])
                keys = dict(image_id=index, category_id=a["category_id"], score=0.9)
                results.append(dict(keys, bbox=a["bbox"], segmentation=rle.encode(mask)))
    return results


def load(folder):
    return coco_json.load_coco(str(folder / "coco.json"), str(folder / "images"))


def test_perfect_predictions_score_100_and_none_score_0(coco_folder):
    dataset = load(coco_folder)
    ground_truth = dataset.coco(range(len(dataset)))
    for kind in ("segm", "bbox"):
        numbers, classes = ap.average_precision(ground_truth, perfect(dataset), kind)
        assert numbers["AP"] == numbers["AR100"] == 100.0
        # A class without any instance has no AP, not AP 0.
        assert classes == [100.0, 100.0, None] and numbers["APl"] is None
        numbers, classes = ap.average_precision(ground_truth, [], kind)
        assert numbers["AP"] == 0.0 and classes == [0.0, 0.0, None]


def test_a_wrong_class_costs_that_class_alone(coco_folder):
    dataset = load(coco_folder)
    results = perfect(dataset)
    for result in results:
        result["category_id"] = 2
    numbers, classes = ap.average_precision(dataset.coco(range(4)), results, "segm")
    assert (
        classes[0] == 0.0
        and 0 < classes[1] < 100
        and numbers["AP"] == pytest.approx(classes[1] / 2, abs=0.01)
    )


def test_saved_predictions_give_the_same_ap_to_pycocotools(coco_folder, tmp_path):
    """The saved file, the dataset's own JSON, and nothing of this project in between."""
    dataset = load(coco_folder)
    rng = np.random.RandomState(0)
    results = perfect(dataset) * 2
    for result in results:
        result["score"] = rng.random_sample()
        result["category_id"] = int(rng.choice([result["category_id"], 1, 2]))
    boxes = ap.save_predictions(tmp_path / "results.json", dataset, results)
    raw = json.loads((coco_folder / "coco.json").read_text())
    for a in raw["annotations"]:
        a["area"], a["bbox"] = 100, a.get("bbox") or [0, 0, 1, 1]
    raw["info"] = {}
    ground_truth = dataset.coco(range(4))
    for kind, path in (("segm", tmp_path / "results.json"), ("bbox", boxes)):
        oracle = COCO()
        # The oracle's ground-truth boxes come from pycocotools' own reading of the masks.
        with contextlib.redirect_stdout(io.StringIO()):
            oracle.dataset = raw
            oracle.createIndex()
            for a in raw["annotations"]:
                a["bbox"] = mask_utils.toBbox(oracle.annToRLE(a)).tolist()
            coco_eval = COCOeval(oracle, oracle.loadRes(str(path)), kind)
            coco_eval.evaluate()
            coco_eval.accumulate()
            coco_eval.summarize()
        ours, _ = ap.average_precision(ground_truth, results, kind)
        assert ours["AP"] == pytest.approx(100 * coco_eval.stats[0], abs=2e-3) and ours["AP"] > 5


def test_faster_coco_eval_has_pycocotools_numbers(monkeypatch):
    """Photographs of 80 classes with crowds; masks shifted, classes mixed up, scores that tie."""
    fast = pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    folder = real("coco_mini")
    dataset = coco_json.load_coco(str(folder / "instances_val.json"), str(folder / "val"))
    rng, results = np.random.RandomState(0), []
    for result in perfect(dataset) * 2:
        mask = np.roll(mask_utils.decode(result["segmentation"]), rng.randint(0, 12, 2), (0, 1))
        made = dict(result, segmentation=rle.encode(mask), score=round(rng.random_sample(), 1))
        made["bbox"] = [float(x) for x in np.add(result["bbox"], rng.uniform(0, 9, 4))]
        if rng.random_sample() < 0.2:
            made["category_id"] = int(rng.randint(1, len(dataset.names) + 1))
        results.append(made)
    truth = dataset.coco(range(len(dataset)))
    # Not rounded.
    monkeypatch.setattr(ap, "percent", float)
    for kind in ("segm", "bbox"):
        assert ap.evaluator() == (fast.COCO, fast.COCOeval_faster)
        theirs, their_classes = ap.average_precision(truth, results, kind)
        with monkeypatch.context() as patch:
            patch.setattr(ap, "evaluator", lambda: (COCO, COCOeval))
            plain, classes = ap.average_precision(truth, results, kind)
        assert 0.1 < plain["AP"] < 0.9
        assert list(theirs.values()) == pytest.approx(list(plain.values()), abs=1e-9)
        assert their_classes == pytest.approx(classes, abs=1e-9)


def test_ap_by_size_goes_by_the_mask_not_by_its_box(coco_folder):
    """A thin diagonal is small, its box is not; given both, pycocotools takes the box."""
    dataset = load(coco_folder)
    mask = np.zeros((32, 48), np.uint8, order="F")
    mask[np.arange(32), np.arange(32) + 8] = 1
    diagonal = dict(image_id=3, category_id=1, score=1.0, segmentation=rle.encode(mask))
    results = [*perfect(dataset), dict(diagonal, bbox=[0, 0, 48, 32])]
    ground_truth = dataset.coco(range(4))
    masks, classes = ap.average_precision(ground_truth, results, "segm")
    # A false positive among the small ones, before all true ones of its class.
    assert masks["APs"] < 100 and masks["APs"] == masks["AP"] and classes[0] < 100
    boxes, _ = ap.average_precision(ground_truth, results, "bbox")
    assert boxes["APs"] == 100 and boxes["AP"] < 100


def test_predictions_lie_in_the_original_frame(shapes_folder):
    """The model resizes to 48 pixels, the results speak of 96."""
    dataset = coco_json.load_coco(f"{shapes_folder}/instances_val.json", f"{shapes_folder}/val")
    net = networks.build_small(7, 48, 48).eval()
    net.roi_heads.score_thresh = 0.0
    results = ap.predictions(net, dataset, [0, 3], torch.device("cpu"))
    assert {r["image_id"] for r in results} == {0, 3}
    assert all(r["segmentation"]["size"] == [96, 96] for r in results)
    assert max(r["bbox"][0] + r["bbox"][2] for r in results) > 60


def test_a_strip_has_other_scales_down_and_across(monkeypatch):
    """Half a pixel of the view, by which masks are moved: 40 x 2000 pixels in 16 x 160."""
    net, seen = networks.build_small(7, 96, 160).eval(), []
    monkeypatch.setattr(ap, "encode", lambda *given: seen.append(given[2:]) or [{}] * len(given[0]))
    ap.detect_instances(net, [torch.zeros(3, 40, 2000, dtype=torch.uint8)], "cpu", 0.0)
    assert seen == [((40, 2000), (0.5 * 40 / 16, 0.5 * 2000 / 160))]


FREED_BETWEEN_BLOCKS_IN_USE = """
import torch
from ssis.report import ap

def used():
    (line,) = [x for x in open("/proc/self/smaps_rollup") if x.startswith("Pss:")]
    return int(line.split()[1]) / 1000

freed, held = [], []
for _ in range(2000):
    freed.append(torch.ones(25_000))
    held.append(torch.ones(1_000))
del freed
before = used()
ap.give_back_memory()
print(before - used())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_freed_memory_goes_back_to_the_system():
    """200 MB in blocks of 100 kB, each beside a small one that stays: a heap in pieces.

    In a process of its own, whose heap nothing else has been in. What it is worth in a run
    is measured by docs/bench/long_run.py.
    """
    done = subprocess.run(
        [sys.executable, "-c", FREED_BETWEEN_BLOCKS_IN_USE],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 150


def test_an_evaluation_in_a_run_ends_by_giving_memory_back(shapes_folder, monkeypatch):
    dataset = coco_json.load_coco(f"{shapes_folder}/instances_val.json", f"{shapes_folder}/val")
    called = []
    monkeypatch.setattr(ap, "give_back_memory", lambda: called.append(True))
    net = networks.build_small(7, 48, 48).train()
    ap.evaluate(net, dataset, torch.device("cpu"))
    # A model that is being trained goes on in training mode.
    assert called == [True] and net.training


def erode(mask: np.ndarray, times: int) -> np.ndarray:
    """A mask less what touches its outside, or the image's edge, again and again."""
    for _ in range(times):
        padded = np.pad(mask, 1)
        mask = np.min(
            [
                padded[dy : dy + mask.shape[0], dx : dx + mask.shape[1]]
                for dy in range(3)
                for dx in range(3)
            ],
            axis=0,
        )
    return mask


@pytest.mark.parametrize("shift", [0, 1, 2, 4])
def test_boundary_ap_is_the_papers(tmp_path, shift):
    """By hand: min(mask IoU, boundary IoU) with a band of 2 % of the diagonal, and the
    fraction of the ten thresholds that it passes."""
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    height, width = 120, 160
    true, detected = np.zeros((2, height, width), np.uint8)
    true[20:80, 30:110] = 1
    detected[20 + shift : 80 + shift, 30:110] = 1
    band = round(0.02 * (height**2 + width**2) ** 0.5)
    assert band == 4
    edges = [mask - erode(mask, band) for mask in (true, detected)]
    iou = min(
        np.logical_and(*pair).sum() / np.logical_or(*pair).sum()
        for pair in ((true, detected), edges)
    )
    expected = 100 * np.mean([iou >= t for t in np.arange(0.5, 1, 0.05)])

    raw = dict(
        images=[dict(id=1, file_name="a.png", height=height, width=width)],
        categories=[dict(id=1, name="cat")],
        annotations=[
            dict(id=1, image_id=1, category_id=1, iscrowd=0, segmentation=rle.encode(true))
        ],
    )
    (tmp_path / "coco.json").write_text(json.dumps(raw))
    ground_truth = coco_json.load_coco(str(tmp_path / "coco.json"), str(tmp_path)).coco([0])
    results = [dict(image_id=0, category_id=1, score=0.9, segmentation=rle.encode(detected))]
    numbers, _ = ap.average_precision(ground_truth, results, "boundary")
    assert numbers["AP"] == pytest.approx(expected, abs=0.01)
    assert ap.average_precision(ground_truth, [], "boundary")[0]["AP"] == 0.0


def test_boundary_ap_without_its_package_is_one_line(coco_folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--boundary: .* pip install faster-coco-eval"):
        # Before anything is evaluated, or even read.
        evaluate.run([str(coco_folder / "no.pt"), "--boundary"])


def crowd(folder, count=120):
    """An image with many small squares, all of which are found."""
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    Image.new("L", (240, 120), 90).save(folder / "images" / "0.png")
    corners = [(12 * (k % 20) + 2, 12 * (k // 20) + 2) for k in range(count)]
    raw = dict(
        images=[dict(id=1, file_name="0.png", width=240, height=120)],
        categories=[dict(id=1, name="cell")],
        annotations=[
            dict(id=k, image_id=1, category_id=1, iscrowd=0,
                 segmentation=[[x, y, x + 8, y, x + 8, y + 8, x, y + 8]])
            for k, (x, y) in enumerate(corners, 1)
        ],
    )  # fmt: skip
    (folder / "coco.json").write_text(json.dumps(raw))
    return load(folder)


@pytest.mark.parametrize("fast", [False, True])
def test_more_than_a_hundred_instances_are_counted(tmp_path, monkeypatch, fast):
    """120 of 120 found is an AP of 100, and COCO's is told beside it: five sixths of the recall."""
    if fast:
        pytest.importorskip("faster_coco_eval")
    else:
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    dataset = crowd(tmp_path)
    truth, results = dataset.coco([0]), perfect(dataset)
    assert len(results) == 120
    for kind in ("segm", "bbox"):
        usual, _ = ap.average_precision(truth, results, kind)
        numbers, classes = ap.average_precision(truth, results, kind, 200)
        assert numbers["AP"] == classes[0] == numbers["AP50"] == numbers["AR200"] == 100.0
        assert numbers["AP@100"] == usual["AP"] == pytest.approx(100 * 84 / 101, abs=1e-3)
        assert "AP@100" not in usual and "AR100" not in numbers
        # A model that gives fewer is counted as COCO counts.
        assert ap.average_precision(truth, results, kind, 7)[0] == usual


def test_a_run_on_crowded_images_finds_as_many(tmp_path, capsys):
    """The setting follows the labeled images, and every later command follows the run."""
    import train
    from ssis.engine import resume
    from ssis.tools import export, predict

    dataset = crowd(tmp_path)
    assert dataset.most_instances([0]) == 120
    files = [str(tmp_path / "coco.json"), str(tmp_path / "images")]
    flags = [
        f"--{part}-{kind}={path}"
        for part in ("train", "val")
        for kind, path in zip(("json", "images"), files, strict=True)
    ]
    run = tmp_path / "run"
    flags += [
        "--preset", "custom", "--method", "supervised", "--labeled", "100%",
        "--short-side-min", "48", "--short-side", "48", "--long-side", "96", "--labeled-batch",
        "1", "--pretrain-steps", "1", "--burnin-steps", "0", "--mutual-steps", "0",
    ]  # fmt: skip
    train.main([*flags, "--output", str(tmp_path / "few"), "--max-detections", "100"])
    assert "120 instances, more than the 100 detections per image" in capsys.readouterr().err
    train.main([*flags, "--output", str(run)])
    said = capsys.readouterr()
    assert "more than the" not in said.err
    assert "has 120 instances; up to 200 detections per image are kept" in said.err
    assert "mask (of 100)" in said.out
    assert "AP@100: of 100 detections" in (run / "report.html").read_text()
    net, *_ = resume.load_model(run / "checkpoint.pt", "")
    assert net.roi_heads.detections_per_img == 200
    # With one class, what the first stage proposes is a limit as well.
    assert net.rpn.eval().post_nms_top_n() == net.rpn.pre_nms_top_n() == 400
    net, *_ = resume.load_model(run / "best.pt", "")
    assert net.roi_heads.detections_per_img == 200
    evaluate.main([str(run / "checkpoint.pt")])
    assert "AR200" in capsys.readouterr().out
    export.run([str(run / "checkpoint.pt"), "--out", str(tmp_path / "out")])
    plain = export.load_plain(tmp_path / "out")
    assert plain.roi_heads.detections_per_img == 200 and plain.rpn.post_nms_top_n() == 400
    said = error_of(capsys, evaluate.main, [run / "checkpoint.pt", "--max-detections", "-3"])
    assert "--max-detections -3: COCO's AP needs at least 100" in said
    predict.run([
        str(run / "checkpoint.pt"), files[1], "--out", str(tmp_path / "found"), "--score", "0",
        "--max-detections", "7",
    ])  # fmt: skip
    found = json.loads((tmp_path / "found" / "results.json").read_text())
    assert len(found) == 7
    assert "1 with 7 instances, the most looked for: --max-det" in capsys.readouterr().out
