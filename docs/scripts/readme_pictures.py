"""The two pictures of README.md, from finished runs; readable on a page of 900 pixels.

    python docs/scripts/readme_pictures.py stages RUN IMAGE ...           docs/img/pseudo_labels.png
    python docs/scripts/readme_pictures.py gain SUPERVISED RUN IMAGE ...  docs/img/photographs.jpg

RUN is the folder of a finished run. "stages": what becomes of the first teacher's predictions when
the burn-in begins; IMAGE is the number of an unlabeled image. "gain": what an equally long
supervised run and the last teacher find in validation images; RUN and SUPERVISED have one seed.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from ssis import calibration, correction, data  # noqa: E402
from ssis.datasets import parts, split  # noqa: E402
from ssis.engine import resume  # noqa: E402
from ssis.engine.build import build  # noqa: E402
from ssis.report import ap, audit, pictures  # noqa: E402

WHERE = ROOT / "docs" / "img"


def stages(run: Path, wanted: list[int]) -> None:
    """What the teacher predicts, what is taught, what that becomes, and the truth."""
    _, config, names, _ = resume.load_model(run / "pretrained.pt", "student")
    train_set, val_set, _ = parts.open_parts(config)
    labeled, unlabeled = split.split(train_set, config, run / "labeled.json")
    sizes = (config.view_size, config.seed, config.oracle)
    streams = data.make_streams(train_set, labeled, unlabeled, *sizes)
    # As in train.py when the burn-in begins.
    made = build(config, train_set, 0, 1, torch.device("cpu"), val_set)
    student, labeler, _, *rest = made
    learning = dict(zip(("optimizer", "schedule", "scaler"), rest, strict=True))
    state = dict(student=student, **labeler._asdict(), **learning)
    step = resume.restore(run / "pretrained.pt", state, config, names, 0, True)["step"]
    labeler.teacher.load_state_dict(student.state_dict())
    labeler.thresholds.start(train_set.class_shares(labeled))
    correction.fill(labeler.classifier, labeler.teacher, streams.labeled, 0, 1)
    if config.filter == "calibrated":
        judged = data.Stream(val_set, list(range(len(val_set))), config.view_size, 0, True)
        items = (judged[k] for k in range(len(val_set)))
        calibration.calibrate(labeler, *calibration.look(labeler, items, config))

    rows = []
    for index in wanted:
        item = data.Stream(train_set, [index], config.view_size, 0, True)[0]
        image, target = item["image"], item["target"]
        made = train.pseudo_labels(labeler, [image], [item], config, step, audit.PREDICTED)
        first, final = made["predicted"][0], made["final"][0]
        scored = (first.masks, first.labels, names, first.class_quality)
        rows.append(
            [
                (pictures.overlay(image, *scored, side=192), ""),
                (pictures.overlay(image, final.masks, final.labels, names, side=192), ""),
                (pictures.overlay(image, target["masks"], target["labels"], names, side=192), ""),
            ]
        )
    titles = ["predicted by the teacher", "taught to the student", "ground truth (never seen)"]
    pictures.grid(rows, titles, WHERE / "pseudo_labels.png")


def gain(supervised: Path, run: Path, wanted: list[int]) -> None:
    """Validation images: equally long supervised training, the last teacher, and the truth."""
    (alone, *_), (last, config, names, _) = (
        resume.load_model(each / "checkpoint.pt", "") for each in (supervised, run)
    )
    val_set = parts.open_parts(config)[1]
    rows = []
    for index in wanted:
        image, target = val_set.image(index), val_set.target(index)
        tiles = [
            pictures.detections(image, ap.detect_instances(net, [image], "cpu", 0.5)[0], names, 240)
            for net in (alone, last)
        ]
        masks, labels = target["masks"].bool(), target["labels"]
        tiles.append(pictures.overlay(image.float() / 255, masks, labels, names, side=240))
        rows.append([(tile, "") for tile in tiles])
    titles = ["labels alone", "with unlabeled images", "ground truth"]
    pictures.grid(rows, titles, WHERE / "photographs.jpg")


if __name__ == "__main__":
    what, *given = sys.argv[1:]
    runs = [Path(each) for each in given if not each.isdigit()]
    {"stages": stages, "gain": gain}[what](*runs, [int(each) for each in given if each.isdigit()])
