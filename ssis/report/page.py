r"""A run on one page: settings, results, curves, pictures.

    python -m ssis report runs/<name>

Every run ends by writing `report.html` into its folder; the command writes it anew,
also while a run is under way. The page is one file without scripts: pictures are
inside, it can be sent by mail, and it reads on a telephone.

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

import numpy as np
from matplotlib import pyplot as plt
from pycocotools import mask as mask_utils

from ssis import UserError, distributed
from ssis.report import curves, pictures
from ssis.config import Config, flag, from_saved
from ssis.io.files import write_text, writing
from ssis.report.curves import MODELS

# So many strips of pseudo-labels, from the first to the last.
STRIPS = 6

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem;
  padding: 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
img, svg { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
.scroll img { max-width: none; width: max(100%, 44rem); }
.panels .scroll img { width: 100%; }
.panels { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
.panels svg, .panels img { width: 100%; background: white; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:first-child { white-space: nowrap; }
.warning { background: #c30; color: white; padding: .5rem; }
.note { opacity: .75; } code { background: #8882; padding: 0 .25rem; }
pre { background: #8882; padding: .5rem; overflow-x: auto; }
"""


# ----------------------------------------------------------------------- best and worst


def quality(dataset, index: int, found: list[dict]) -> float | None:
    """PQ of the detections in one image, in [0, 1].

    Args:
        dataset: a `data.Dataset`.
        index: the image.
        found: its COCO results, of which those with score > 0.5 count.

    Returns:
        None for an image with neither instances nor detections.
    """
    seen = sorted((f for f in found if f["score"] > 0.5), key=lambda f: -f["score"])
    labels = dataset.annotations(index)
    whole = list(zip(dataset.rles(index), labels, strict=True))
    truth = [(rle, label) for rle, (label, crowd) in whole if not crowd]
    crowds = [rle for rle, (_, crowd) in whole if crowd]
    total, taken, matched = 0.0, set(), set()
    if seen and truth:
        rles = [f["segmentation"] for f in seen]
        iou = mask_utils.iou(rles, [rle for rle, _ in truth], [0] * len(truth))
        for place, (row, detection) in enumerate(
            zip(np.asarray(iou), seen, strict=True)
        ):
            for k in np.argsort(-row).tolist():
                right = truth[k][1] == detection["category_id"] and row[k] > 0.5
                if right and k not in taken:
                    taken.add(k)
                    total += row[k]
                    matched.add(place)
                    break
    # What lies on a crowd, for the most part, is neither right nor wrong.
    if crowds and seen:
        rles = [f["segmentation"] for f in seen]
        lies = np.asarray(mask_utils.iou(rles, crowds, [1] * len(crowds)))
        on = np.flatnonzero(lies.max(axis=1) > 0.5).tolist()
        seen = [f for k, f in enumerate(seen) if k not in set(on) - matched]
    if not seen and not truth:
        return None
    # TP + FP / 2 + FN / 2, where TP + FP = detections and TP + FN = instances.
    return total / ((len(seen) + len(truth)) / 2)


def draw_predictions(folder: Path, dataset, found: list[dict]) -> None:
    """Write `predictions.png`, `best.png` and `worst.png`.

    Args:
        folder: the run's.
        dataset: the test images.
        found: COCO results in them.
    """
    of: dict[int, list[dict]] = {}
    for result in found:
        of.setdefault(result["image_id"], []).append(result)
    rows = pictures.ROWS
    first = list(range(min(rows, len(dataset))))
    pictures.predictions(dataset, of, first, folder / "predictions.png")
    scored = [(quality(dataset, i, of.get(i, [])), i) for i in range(len(dataset))]
    scored = sorted((q, i) for q, i in scored if q is not None)
    for name, part in (("worst", scored[:rows]), ("best", scored[: -rows - 1 : -1])):
        notes = [f"{dataset.files[i]}: PQ {q:.2f}" for q, i in part]
        chosen = [i for _, i in part]
        if chosen:
            path = folder / f"{name}.png"
            pictures.predictions(dataset, of, chosen, path, notes)


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
    who = [name for name in MODELS if name in details]
    numbers = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    rows = [
        [f"{name}, {kind}", *(details[name][kind][n] for n in numbers)]
        for kind in ("mask", "box")
        for name in who
    ]
    text = table(["in percent", *numbers], rows)
    text += (
        f'<p class="note">On {html.escape(summary["evaluated_on"])} '
        f"({summary['test_images']} images). pretrained: the first teacher, which has "
        "seen labeled images only. APs, APm, APl: instances under 32², under 96² and "
        "larger, in pixels.</p>"
    )
    keys = ["pseudo_per_image", "box_precision", "class_accuracy", "mask_iou", "recall"]
    rows = [
        [f"{when}: {stage}", *(numbers[key] for key in keys)]
        for when, stages in summary["audit_stages"].items()
        for stage, numbers in (stages or {}).items()
        if stage != "final"
    ]
    if rows:
        text += "<h2>The pseudo-labels, stage by stage</h2>"
        text += table(["audit", *(key.replace("_", " ") for key in keys)], rows)
        text += (
            '<p class="note">Against the ground truth of unlabeled images, which '
            f"training never sees; {summary['audit']['labeled_per_image']} instances "
            "an image are to be expected.</p>"
        )
    return text


def per_class(summary: dict) -> str:
    """AP of each class, beside what its pseudo-labels were worth."""
    details, audit = summary["details"], summary.get("audit_per_class") or {}
    who = [name for name in MODELS if name in details]
    keys = ["box_precision", "class_accuracy", "recall"] if audit else []
    rows = [
        [
            name,
            *(details[w]["mask_per_class"][name] for w in who),
            *(audit[name][key] for key in keys),
        ]
        for name in details[who[-1]]["mask_per_class"]
    ]
    head = ["class", *(f"{w} AP" for w in who), *(k.replace("_", " ") for k in keys)]
    return "<h2>Class by class</h2>" + table(head, rows)


def settings(saved: dict) -> str:
    """All settings, those that differ from the built-in run's first."""
    usual = dataclasses.asdict(Config())
    changed = {k: v for k, v in saved.items() if v != usual.get(k)}
    rest = {k: v for k, v in saved.items() if k not in changed}
    head = ["setting", "value"]
    return (
        "<h2>Settings</h2>"
        + table(head, [[flag(k), repr(v)] for k, v in changed.items()])
        + f"<details><summary>{len(rest)} settings as they are by default</summary>"
        + table(head, [[flag(k), repr(v)] for k, v in rest.items()])
        + "</details>"
    )


def page(folder: Path) -> str:
    """The whole page, from the files of a run."""
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
    parts = [f'<h1>{html.escape(title)}</h1><p class="note">{html.escape(name)}</p>']
    where = html.escape(str(folder))
    if summary is None:
        parts.append(f"<p>{where}: not finished; its settings and curves so far.</p>")
    else:
        earlier = summary.get("first_teacher_given")
        parts.append(
            f"<p>{where}: {summary['labeled']} labeled and {summary['unlabeled']} "
            f"unlabeled images, seed {summary['seed']}, {summary['steps']} steps in "
            f"{summary['seconds'] / 60:.0f} minutes"
            + (", the first teacher's included" if earlier else "")
            + ".</p>"
        )
        if "warning" in summary:
            parts.append(f'<p class="warning">{html.escape(summary["warning"])}</p>')
        parts.append(results(summary))
    charts = "".join(chart(folder, panel) for panel in ("loss", "ap", "audit"))
    parts.append(f'<h2>Curves</h2><div class="panels">{charts}</div>')
    strips = sorted(folder.glob("pseudo_[0-9]*.png"))
    strips = [p for p in strips if p.stem.removeprefix("pseudo_").isdigit()]
    if strips:
        parts.append("<h2>Pseudo-labels over time</h2>")
        places = np.linspace(0, len(strips) - 1, min(STRIPS, len(strips)))
        for k in sorted(set(places.round().astype(int).tolist())):
            words = f"after step {int(strips[k].stem.removeprefix('pseudo_'))}"
            # The first and the last are to be compared; the others open at a click.
            shown = "open" if k in (0, len(strips) - 1) else ""
            parts.append(
                f"<details {shown}><summary>{words}</summary>"
                f"{picture(strips[k], words)}</details>"
            )
    if summary is not None:
        parts.append(per_class(summary))
    pairs = [("best", "Its best test images"), ("worst", "Its worst")]
    shown = [(words, picture(folder / f"{name}.png", words)) for name, words in pairs]
    shown = [f"<div><h2>{words}</h2>{tag}</div>" for words, tag in shown if tag]
    parts.append(f'<div class="panels">{"".join(shown)}</div>')
    parts.append(settings(saved))
    again = f"python evaluate.py {where}/checkpoint.pt\n"
    again += f"python -m ssis predict {where}/checkpoint.pt IMAGES --out FOLDER"
    parts.append(f"<h2>What to do with it</h2><pre>{again}</pre>")
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def finish(folder: Path, dataset, found: list[dict]) -> None:
    """All pictures of the end of a run, and the page; see `draw_predictions`."""
    with writing(folder / "curves.png"):
        figure = curves.draw(folder)
        figure.savefig(folder / "curves.png", dpi=110)
        plt.close(figure)
    draw_predictions(folder, dataset, found)
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
    distributed.program(run, argv)
