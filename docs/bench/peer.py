r"""A peer on the same work: Ultralytics' smallest segmentation model, from scratch.

    pip install ultralytics         (AGPL-3.0: called as a program, imported by nothing here)
    python docs/bench/peer.py --minutes 12 [--data data/shapes] [--labeled 5%] [--seed 0]

The labeled images are those that `train.py` draws with the same seed. In the minutes given, on one
thread and without a GPU:

    labels alone     trains on the labeled images
    self-training    trains on them for half of the time, predicts the unlabeled ones, keeps what
                     has a score of one half or more, and trains anew on both for the other half

Validation is off while it trains, so all of the time is training; what self-training takes to
predict comes on top. Our validation images, whose labels `full` measures its thresholds on, are not
used. Both are judged on the test part
by the AP of this project (`ssis/report/ap.py`), the masks as Ultralytics writes them in COCO's
format. Its labels are polygons: a hole is joined to its outline by a line of no width, as are the
parts of a mask.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from contourpy import FillType, contour_generator
from pycocotools import mask as mask_utils

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ssis.datasets import shapes, split  # noqa: E402
from ssis.datasets.coco_json import load_coco  # noqa: E402
from ssis.report import ap  # noqa: E402

SURE = 0.5


def polygon(mask: np.ndarray) -> list[float]:
    """One polygon for a mask (H, W) bool: x, y, ... as fractions of the image."""
    height, width = mask.shape
    # With a border, so that every outline is closed; a pixel's value is at its center.
    lines = contour_generator(z=np.pad(mask, 1).astype(float), fill_type=FillType.OuterOffset)
    outlines = []
    for points, offsets in zip(*lines.filled(0.5, 2.0), strict=True):
        outlines += [points[a:b] - 0.5 for a, b in pairwise(offsets)]
    joined = np.concatenate([*outlines, *[outline[:1] for outline in outlines[-2::-1]]])
    return (joined / [width, height]).clip(0, 1).flatten().tolist()


def write_labels(path: Path, instances: list[tuple[int, np.ndarray]]) -> None:
    """The label file of an image: class from 0, polygon."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [(label - 1, polygon(mask)) for label, mask in instances if mask.sum() > 2]
    path.write_text("".join(f"{k} {' '.join(f'{v:.5f}' for v in xy)}\n" for k, xy in rows))


def link(dataset, indices: list[int], folder: Path, annotated: bool) -> None:
    """Images of a dataset in a folder as Ultralytics has it, with their labels."""
    for index in indices:
        source = Path(dataset.path(index)).resolve()
        place = folder / "images" / f"{index}{source.suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(source)
        if annotated:
            target = dataset.target(index)
            pairs = zip(target["labels"].tolist(), target["masks"].bool().numpy(), strict=True)
            write_labels(folder / "labels" / f"{index}.txt", list(pairs))


def yolo(work: Path, *arguments: str) -> None:
    """One call of the program."""
    settings = dict(YOLO_CONFIG_DIR=str(work), OMP_NUM_THREADS="1", YOLO_OFFLINE="true")
    usual = ("device=cpu", "plots=False", "workers=0", f"project={work}", "exist_ok=True")
    with open(work / "log.txt", "a") as log:
        subprocess.run(
            ["yolo", "segment", *arguments, *usual],
            env={**os.environ, **settings}, check=True, stdout=log, stderr=log,
        )  # fmt: skip


def fit(work: Path, args, trained_on: list[str], minutes: float, name: str) -> Path:
    """Train from scratch; returns the weights after the last epoch."""
    describe(work, trained_on, args.names, "test")
    yolo(
        work, "train", f"model={args.model}", f"data={work}/data.yaml", f"imgsz={args.size}",
        f"time={minutes / 60}", "pretrained=False", "val=False", f"seed={args.seed}",
        f"name={name}",
    )  # fmt: skip
    return work / name / "weights" / "last.pt"


def describe(work: Path, trained_on: list[str], names: list[str], judged: str) -> None:
    """The YAML of a dataset."""
    folders = [str((work / part / "images").resolve()) for part in trained_on]
    judged = str((work / judged / "images").resolve())
    whole = dict(train=folders, val=judged, names=dict(enumerate(names)))
    (work / "data.yaml").write_text(json.dumps(whole))  # JSON is YAML


def found(work: Path, args, weights: Path, part: str, score: float) -> list[dict]:
    """COCO results of a model on a part, image_id being the index."""
    describe(work, ["labeled"], args.names, part)
    yolo(
        work, "val", f"model={weights}", f"data={work}/data.yaml", f"imgsz={args.size}",
        "save_json=True", f"conf={score}", "max_det=100", f"name=on-{part}",
    )  # fmt: skip
    path = work / f"on-{part}" / "predictions.json"
    return json.loads(path.read_text()) if path.exists() else []


def main() -> None:
    """Both ways, and their AP."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, required=True, help="of training, each way")
    parser.add_argument("--data", type=Path, default=Path("data/shapes"))
    parser.add_argument("--labeled", default="5%")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="yolo11n-seg.yaml")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--work", type=Path, default=Path("runs/peer"))
    args = parser.parse_args()
    if not shutil.which("yolo"):
        raise SystemExit("pip install ultralytics")
    if args.data == Path("data/shapes"):
        shapes.make(args.data)
    work = (args.work / f"{args.model.split('.')[0]}-s{args.seed}").resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    train_set, test_set = (
        load_coco(str(args.data / f"instances_{part}.json"), str(args.data / part))
        for part in ("train", "test")
    )
    args.names = train_set.names
    labeled, _ = split.draw_split(train_set, args.labeled, args.seed)
    unlabeled = [i for i in range(len(train_set)) if i not in set(labeled)]
    link(train_set, labeled, work / "labeled", True)
    link(train_set, unlabeled, work / "unlabeled", False)
    link(test_set, range(len(test_set)), work / "test", True)

    results, begin = {}, time.time()
    for way in ("labels alone", "self-training"):
        if way == "labels alone":
            weights = fit(work, args, ["labeled"], args.minutes, "alone")
        else:
            weights = fit(work, args, ["labeled"], args.minutes / 2, "first")
            of_image: dict[int, list] = {}
            for one in found(work, args, weights, "unlabeled", SURE):
                mask = mask_utils.decode(one["segmentation"]).astype(bool)
                of_image.setdefault(int(one["image_id"]), []).append((one["category_id"], mask))
            # An image in which nothing is found is left out.
            link(train_set, list(of_image), work / "pseudo", False)
            for index, instances in of_image.items():
                write_labels(work / "pseudo" / "labels" / f"{index}.txt", instances)
            both = ["labeled", "pseudo"] if of_image else ["labeled"]
            weights = fit(work, args, both, args.minutes / 2, "second")
        detections = found(work, args, weights, "test", 0.001)
        truth = test_set.coco(range(len(test_set)))
        numbers, _ = ap.average_precision(truth, detections, "segm")
        results[way] = dict(mask_ap=numbers["AP"], minutes=round((time.time() - begin) / 60, 1))
        print(f"{args.model}, seed {args.seed}, {way}: mask AP {numbers['AP']:.1f}", flush=True)
        begin = time.time()
    settings = {key: str(value) for key, value in vars(args).items()}
    settings["work"] = "runs/peer"
    path = ROOT / "docs" / "results" / f"peer-s{args.seed}.json"
    path.write_text(json.dumps(dict(settings=settings, **results), indent=1) + "\n")


if __name__ == "__main__":
    main()
