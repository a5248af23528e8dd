r"""Curves: losses, validation AP and the audit, over the steps of a run.

What to look for: the loss on unlabeled images falls as the teacher and the student
come to agree, whoever is right; so the audit beside it says whether they are. A
teacher's AP that stops rising while its class accuracy stands still is confirming its
own mistakes.

Read next: `ssis/report/page.py`, the page they are on.
"""

import contextlib
import json
from pathlib import Path

import matplotlib

# No window: the pictures are files, also on a machine without a display.
matplotlib.use("Agg")
from matplotlib import pyplot as plt


# The models whose AP a run reports; best: on the validation part, at any time.
MODELS = ("pretrained", "student", "teacher", "best")
# What readers see.
TITLES = dict(zip(MODELS, ("first teacher", *MODELS[1:]), strict=True))


# Why a panel may stay empty in a finished run.
EMPTY = dict(
    audit="none: no teacher, or no ground truth\nof unlabeled images to compare with"
)


def read_metrics(path: Path) -> list[dict]:
    """The lines of a `metrics.jsonl`; one that a kill cut in half is passed over."""
    lines = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return lines


def draw(folder, panels: tuple[str, ...] = ("loss", "ap", "audit")):
    """The curves of a run, from `metrics.jsonl`: losses, validation AP, audit.

    Returns:
        A matplotlib figure with those panels side by side; the caller closes it.
    """
    lines = read_metrics(folder / "metrics.jsonl")
    size = (13 / 3 * len(panels), 3.6)
    figure, axes = plt.subplots(
        1, len(panels), figsize=size, layout="constrained", squeeze=False
    )
    panel = dict(loss=losses_panel, ap=ap_panel, audit=audit_panel)
    for name, place in zip(panels, axes[0], strict=True):
        panel[name](place, lines)
        place.set_xlabel("step")
        place.grid(alpha=0.3)
        if place.has_data():
            place.legend()
        else:
            # An empty frame would look like a fault.
            middle = dict(ha="center", va="center", transform=place.transAxes)
            place.text(0.5, 0.5, EMPTY.get(name, "nothing yet"), **middle)
    return figure


def losses_panel(axes, lines: list[dict]) -> None:
    """The sum of the losses on labeled and on unlabeled images."""
    for prefix in ("labeled", "unlabeled"):
        points = [
            (
                line["step"],
                sum(v for k, v in line.items() if k.startswith(prefix + "/")),
            )
            for line in lines
            if f"{prefix}/loss_mask" in line
        ]
        if points:
            axes.plot(*zip(*points, strict=True), label=prefix)
    axes.set_title("loss")


def ap_panel(axes, lines: list[dict]) -> None:
    """Mask AP of student and teacher on the validation images."""
    for who in ("student", "teacher"):
        key = f"val_mask_ap_{who}"
        points = [
            (line["step"], line[key]) for line in lines if line.get(key) is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=who)
    axes.set_title("validation mask AP, %")


def audit_panel(axes, lines: list[dict]) -> None:
    """The audit of the teacher's pseudo-labels."""
    audits = [(line["step"], line["audit"]) for line in lines if line.get("audit")]
    for key in ("box_precision", "class_accuracy", "mask_iou", "recall"):
        points = [
            (step, audit[key]) for step, audit in audits if audit[key] is not None
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True), marker="o", label=key.replace("_", " ")
            )
    axes.set_title("audit of the pseudo-labels")
    axes.set_ylim(0, 1)
