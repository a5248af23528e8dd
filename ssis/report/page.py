r"""A run on one page: settings, results, curves, pictures.

    python -m ssis report runs/<name>

Every run ends by writing `report.html` into its folder; the command writes it anew,
also while a run is under way. The page is one file without scripts: pictures are
inside, it can be sent by mail, and it reads on a telephone. Its frame and its style are
in `page.html`.

Which test images the model did best and worst on is decided by the panoptic quality
(Kirillov et al., CVPR 2019) of its detections with score > 0.5, for a single image:

    $PQ = \sum_{TP} IoU / (TP + FP / 2 + FN / 2)$,

where a detection is a true positive (TP) if it lies on an instance of its class with a
mask IoU above 0.5.

Read next: back to `train.py`.
"""

import argparse
import base64
import dataclasses
import html
import io
import json
from pathlib import Path
from string import Template

import numpy as np
from matplotlib import pyplot as plt
from pycocotools import mask as mask_utils

from ssis import UserError
from ssis.report import curves, pictures
from ssis.config import Config, flag, from_saved
from ssis.io import program
from ssis.io.files import write_text, writing
from ssis.report.curves import MODELS, TITLES

# So many strips of pseudo-labels, from the first to the last.
STRIPS = 6

# The page, with a placeholder for each part that `page` fills in.
TEMPLATE = Path(__file__).with_name("page.html")


# ----------------------------------------------------------------------- best and worst


def quality(dataset, index: int, detections: list[dict]) -> float | None:
    """PQ of the detections in one image, in [0, 1].

    Args:
        dataset: a `datasets.dataset.Dataset`.
        index: the image.
        detections: its COCO results, of which those with score > 0.5 count.

    Returns:
        None for an image with neither instances nor detections.
    """
    sure = [d for d in detections if d["score"] > 0.5]
    sure.sort(key=lambda detection: -detection["score"])
    annotations = zip(dataset.rles(index), dataset.annotations(index), strict=True)
    ground_truth, crowds = [], []
    for rle, (label, crowd) in annotations:
        # A crowd is no instance that could be missed; it is asked for below.
        if crowd:
            crowds.append(rle)
        else:
            ground_truth.append((rle, label))
    rles = [detection["segmentation"] for detection in sure]
    total, taken, matched = 0.0, set(), set()
    if sure and ground_truth:
        true = [rle for rle, _ in ground_truth]
        iou = np.asarray(mask_utils.iou(rles, true, [0] * len(true)))
        for row, detection in enumerate(sure):
            for k in np.argsort(-iou[row]).tolist():
                same_class = ground_truth[k][1] == detection["category_id"]
                if same_class and iou[row, k] > 0.5 and k not in taken:
                    taken.add(k)
                    matched.add(row)
                    total += iou[row, k]
                    break
    # What lies on a crowd, for the most part, is neither right nor wrong.
    if crowds and sure:
        # With the flag 1 for a crowd, pycocotools gives intersection over detection.
        overlap = np.asarray(mask_utils.iou(rles, crowds, [1] * len(crowds)))
        ignored = set(np.flatnonzero(overlap.max(axis=1) > 0.5).tolist()) - matched
        sure = [detection for k, detection in enumerate(sure) if k not in ignored]
    if not sure and not ground_truth:
        return None
    # TP + FP / 2 + FN / 2, where TP + FP = detections and TP + FN = instances.
    return total / ((len(sure) + len(ground_truth)) / 2)


def draw_predictions(folder: Path, dataset, detections: list[dict]) -> None:
    """Write `predictions.png`, `best.png` and `worst.png`.

    Args:
        folder: the run's.
        dataset: the test images.
        detections: COCO results in them.
    """
    by_image: dict[int, list[dict]] = {}
    for detection in detections:
        by_image.setdefault(detection["image_id"], []).append(detection)
    rows = pictures.ROWS
    first = list(range(min(rows, len(dataset))))
    pictures.predictions(dataset, by_image, first, folder / "predictions.png")
    scored = [
        (quality(dataset, i, by_image.get(i, [])), i) for i in range(len(dataset))
    ]
    scored = sorted((pq, i) for pq, i in scored if pq is not None)
    for name, part in (("worst", scored[:rows]), ("best", scored[: -rows - 1 : -1])):
        notes = [f"{dataset.files[i]}: PQ {pq:.2f}" for pq, i in part]
        chosen = [i for _, i in part]
        if chosen:
            path = folder / f"{name}.png"
            pictures.predictions(dataset, by_image, chosen, path, notes)


# ----------------------------------------------------------------------------- the page


def picture(path: Path, words: str) -> str:
    """A picture as a part of the page, "" where there is none."""
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<div class="scroll"><img alt="{html.escape(words)}" '
        f'src="data:image/png;base64,{data}"></div>'
    )


def chart(folder: Path, panel: str) -> str:
    """One panel of the curves as SVG."""
    text = io.StringIO()
    figure = curves.draw(folder, (panel,))
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    # Without the XML header, which has no place inside a page.
    return text.getvalue()[text.getvalue().index("<svg") :]


def table(head: list[str], rows: list[list]) -> str:
    """A table; None is a dash, numbers have the digits that their size asks for."""

    def cell(value) -> str:
        if value is None:
            return "–"
        if isinstance(value, float):
            return f"{value:.1f}" if abs(value) > 1 else f"{value:.2f}"
        return html.escape(str(value))

    lines = ["<tr>" + "".join(f"<th>{cell(c)}</th>" for c in head) + "</tr>"]
    lines += [
        "<tr>" + "".join(f"<td>{cell(c)}</td>" for c in r) + "</tr>" for r in rows
    ]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def results(summary: dict) -> str:
    """AP of every model, and the audit stage by stage."""
    details = summary["details"]
    models = [name for name in MODELS if name in details]
    numbers = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    crowded = all("AP@100" in details[name]["mask"] for name in models)
    numbers += ["AP@100"] if crowded else []
    rows = [
        [f"{TITLES[name]}, {kind}", *(details[name][kind][n] for n in numbers)]
        for kind in ("mask", "box")
        for name in models
    ]
    text = table(["in percent", *numbers], rows)
    text += (
        f'<p class="note">On {html.escape(summary["evaluated_on"])} '
        f"({summary['test_images']} images). The first teacher has seen labeled "
        "images only. APs, APm, APl: instances under 32², under 96² and "
        "larger, in pixels."
        + (" AP@100: of 100 detections an image and class, as COCO." if crowded else "")
        + "</p>"
    )
    keys = ["pseudo_per_image", "box_precision", "class_accuracy", "mask_iou", "recall"]
    rows = [
        [f"{when}: {stage}", *(audit[key] for key in keys)]
        for when, stages in summary["audit_stages"].items()
        for stage, audit in (stages or {}).items()
        if stage != "final"
    ]
    if rows:
        expected = summary["audit"]["labeled_per_image"]
        text += "<h2>The pseudo-labels, stage by stage</h2>"
        text += table(["audit", *(key.replace("_", " ") for key in keys)], rows)
        text += (
            '<p class="note">Against the ground truth of unlabeled images, which '
            f"training never sees; a labeled image has {expected} instances.</p>"
        )
    return text


def introduction(folder: Path, summary: dict | None) -> str:
    """How long the run was, what went wrong, and the results."""
    where = html.escape(str(folder))
    if summary is None:
        return f"<p>{where}: not finished; its settings and curves so far.</p>"
    earlier = summary.get("first_teacher_given")
    text = (
        f"<p>{where}: {summary['labeled']} labeled and {summary['unlabeled']} "
        f"unlabeled images, seed {summary['seed']}, {summary['steps']} steps in "
        f"{summary['seconds'] / 60:.0f} minutes"
        + (", the first teacher's included" if earlier else "")
        + ".</p>"
    )
    if "warning" in summary:
        text += f'<p class="warning">{html.escape(summary["warning"])}</p>'
    return text + verdict(summary) + results(summary) + calibration(summary)


def verdict(summary: dict) -> str:
    """What the unlabeled images brought, in words."""
    given = summary.get("verdict")
    if not given:
        return ""
    text = f"<p><strong>Verdict: {html.escape(given['sentence'])}.</strong></p>"
    for line in given["stages"] + [f"To change: {line}" for line in given["advice"]]:
        text += f"<p>{html.escape(line)}.</p>"
    return text


def calibration(summary: dict) -> str:
    """What was measured on the validation images, time by time."""
    measured = summary.get("calibration")
    if not measured:
        return ""
    keys = ["precision", "recall", "class_accuracy", "mask_iou", "refined_iou", "gate"]
    keys += ["disagreements", "classifier_right", "teacher_right", "trust"]
    rows = []
    for one in measured:
        lowest, highest = min(one["found_thresholds"]), max(one["found_thresholds"])
        gate = "off" if one["gate"] > 1 else one["gate"]
        shown = [gate if key == "gate" else one[key] for key in keys]
        rows.append([str(one["step"]), f"{lowest:.2f} – {highest:.2f}", *shown])
    names = [key.replace("_", " ") for key in keys]
    head = ["after step", "foreground thresholds", *names]
    return (
        "<h2>Calibration on the validation images</h2>"
        + table(head, rows)
        + '<p class="note">Precision: fraction of what is kept that lies on an '
        "instance. Refined iou: of SAM's masks where the teacher's have mask "
        "iou, both with the ground truth. Disagreements: of the category classifier "
        "with the teacher, on found instances. Gate and trust are what was set.</p>"
    )


def strips(folder: Path) -> str:
    """The pictures of pseudo-labels, some of them, evenly spread over the run."""
    paths = sorted(folder.glob("pseudo_[0-9]*.png"))
    paths = [p for p in paths if p.stem.removeprefix("pseudo_").isdigit()]
    if not paths:
        return ""
    text = "<h2>Pseudo-labels over time</h2>"
    places = np.linspace(0, len(paths) - 1, min(STRIPS, len(paths)))
    for k in sorted(set(places.round().astype(int).tolist())):
        words = f"after step {int(paths[k].stem.removeprefix('pseudo_'))}"
        # The first and the last are to be compared; the others open at a click.
        shown = "open" if k in (0, len(paths) - 1) else ""
        text += (
            f"<details {shown}><summary>{words}</summary>"
            f"{picture(paths[k], words)}</details>"
        )
    return text


def per_class(summary: dict | None) -> str:
    """AP of each class, beside the audit of its pseudo-labels."""
    if summary is None:
        return ""
    details, audit = summary["details"], summary.get("audit_per_class") or {}
    models = [name for name in MODELS if name in details]
    keys = ["box_precision", "class_accuracy", "recall"] if audit else []
    rows = [
        [
            name,
            *(details[model]["mask_per_class"][name] for model in models),
            *(audit[name][key] for key in keys),
        ]
        for name in details[models[-1]]["mask_per_class"]
    ]
    head = ["class", *(f"{TITLES[model]} AP" for model in models)]
    head += [key.replace("_", " ") for key in keys]
    return "<h2>Class by class</h2>" + table(head, rows)


def best_and_worst(folder: Path) -> str:
    """The test images that the model did best and worst on, if they were drawn."""
    text = ""
    for name, words in (("best", "Its best test images"), ("worst", "Its worst")):
        tag = picture(folder / f"{name}.png", words)
        text += f"<div><h2>{words}</h2>{tag}</div>" if tag else ""
    return text


def page(folder: Path) -> str:
    """The whole page, from the files of a run.

    Raises:
        UserError: the folder is not that of a run.
    """
    try:
        saved = json.loads((folder / "config.json").read_text())
        saved = dataclasses.asdict(from_saved(saved))
        path = folder / "summary.json"
        summary = json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}: not the folder of a run ({error})") from error
    title = f"{saved['method']} on {saved['preset']}, {saved['labeled']} labeled"
    # The name that the run would have on its own says which parts are switched.
    name = Config(**{**saved, "output": ""}).run_folder.name
    # What differs from the default run comes first, the rest opens at a click.
    usual = dataclasses.asdict(Config())
    rows = [[flag(k), repr(v)] for k, v in saved.items() if v != usual.get(k)]
    rest = [[flag(k), repr(v)] for k, v in saved.items() if v == usual.get(k)]
    panels = ("loss", "ap", "audit")
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        name=html.escape(name),
        folder=html.escape(str(folder)),
        results=introduction(folder, summary),
        curves="".join(chart(folder, panel) for panel in panels),
        strips=strips(folder),
        classes=per_class(summary),
        best_and_worst=best_and_worst(folder),
        changed=table(["setting", "value"], rows),
        count=len(rest),
        unchanged=table(["setting", "value"], rest),
    )


def finish(folder: Path, dataset, detections: list[dict]) -> None:
    """Write all pictures of the end of a run, and the page.

    Args: as for `draw_predictions`.
    """
    with writing(folder / "curves.png"):
        figure = curves.draw(folder)
        figure.savefig(folder / "curves.png", dpi=110)
        plt.close(figure)
    draw_predictions(folder, dataset, detections)
    write(folder)


def write(folder: Path) -> None:
    """Write `report.html`."""
    with writing(folder / "report.html"):
        write_text(folder / "report.html", page(folder))


def run(argv: list[str] | None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ssis report", description="A run on one page."
    )
    parser.add_argument("folder", type=Path, help="runs/<name>")
    args = parser.parse_args(argv)
    write(args.folder)
    print(args.folder / "report.html")


def main(argv: list[str] | None = None) -> None:
    """`run`, with one line and status 2 for what the user did wrong."""
    program.run(run, argv)
