"""The tables and pictures of the walk (`docs/scripts/walk.py`), which shows what is in them."""

import os
from pathlib import Path

import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor
from torch.nn import functional as F

from ssis import prototypes
from ssis.report import pictures

# Where pictures (and a first teacher, if one has to be trained) go.
OUT = Path(os.environ.get("WALK_OUT", "runs/walk"))
# Rows of a table, and instances of a picture, that are shown.
ROWS, INSTANCES = 12, 4
# One color for each class, the project's, in [0, 1].
COLORS = [tuple(part / 255 for part in color) for color in pictures.COLORS]


def table(head: str, rows: list[tuple]) -> None:
    """Print rows under a head; `head` names the columns, two spaces between them."""
    cells = [head.split("  "), *([written(value) for value in row] for row in rows[:ROWS])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        pairs = zip(line, widths, strict=True)
        print("  ".join(text.rjust(width) for text, width in pairs).rstrip())
    if len(rows) > ROWS:
        print(f"... and {len(rows) - ROWS} more")


def written(value) -> str:
    """A number with three decimals, yes or no, anything else as it is."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return " ".join(written(part) for part in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def sheet(rows: int, columns: int, height: float = 1.0) -> tuple[Figure, list]:
    """An empty figure, 9 inches wide, and its axes: a list of rows.

    Args:
        rows, columns: of the axes.
        height: of an axis, in widths of one.
    """
    inches = 9 / columns * height * rows + 0.25 * rows
    figure = Figure(figsize=(9, inches), dpi=100, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def panel(
    axis, image: Tensor, title: str = "", pseudo=None, notes: tuple = (), crop: Tensor | None = None
) -> None:
    """An image with its instances, in the coordinates of its pixels.

    Args:
        axis: of `sheet`; its coordinates become those of points in the view, where the
            first pixel's center is 0.5.
        image: (3, H, W) float in [0, 1].
        title: above it.
        pseudo: `PseudoLabels`, or a target's dict of labels and masks, or None.
        notes: a text for each instance, written on it.
        crop: a box (4,); the square around it is shown, with a margin.
    """
    height, width = image.shape[-2:]
    pixels = image.permute(1, 2, 0).clamp(0, 1)
    axis.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest")
    target = pseudo if isinstance(pseudo, dict) else vars(pseudo) if pseudo else {}
    # The best one last, so that its outline is in front.
    pairs = zip(target.get("masks", ()), target.get("labels", ()), strict=True)
    for mask, label in reversed(list(pairs)):
        outline(axis, mask > 0, COLORS[(label - 1) % len(COLORS)])
    for mask, note in zip(target.get("masks", ()), notes, strict=False):
        ys, xs = torch.where(mask > 0)
        if len(ys):
            write(axis, xs.float().mean().item() + 0.5, ys.float().mean().item() + 0.5, note)
    finish(axis, title, (0, width, height, 0) if crop is None else around(crop))


def around(box: Tensor) -> tuple[float, float, float, float]:
    """The square around a box, with a margin: left, right, bottom, top."""
    x1, y1, x2, y2 = box.tolist()
    half = max(x2 - x1, y2 - y1) / 2 + 6
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    return x - half, x + half, y + half, y - half


def finish(axis, title: str, limits: tuple[float, float, float, float]) -> None:
    """Title and limits (left, right, bottom, top) of a picture without ticks."""
    axis.set_xlim(*limits[:2])
    axis.set_ylim(*limits[2:])
    axis.set_facecolor("lightgray")
    axis.set_title(title, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])


def outline(axis, mask: Tensor, color: tuple) -> None:
    """The border of a mask (H, W), along the sides of its pixels."""
    inside = F.pad(mask.int(), (1, 1, 1, 1))
    # A side is drawn where a pixel and its neighbor, left or above, differ.
    ys, xs = torch.where(inside[1:-1, 1:] != inside[1:-1, :-1])
    upright = [[(x, y), (x, y + 1)] for x, y in zip(xs.tolist(), ys.tolist(), strict=True)]
    ys, xs = torch.where(inside[1:, 1:-1] != inside[:-1, 1:-1])
    level = [[(x, y), (x + 1, y)] for x, y in zip(xs.tolist(), ys.tolist(), strict=True)]
    # On any image: a dark line is edged with white, a light one with black.
    edge = "black" if sum(color) > 1.5 else "white"
    for ink, width in ((edge, 3.2), (color, 1.6)):
        lines = LineCollection(upright + level, colors=[ink], linewidths=width)
        lines.set_capstyle("projecting")
        axis.add_collection(lines)


def write(axis, x: float, y: float, text: str) -> None:
    """A text that can be read on any image."""
    edge = [withStroke(linewidth=2.5, foreground="black")]
    style = dict(color="white", fontsize=8, ha="center", va="center")
    axis.text(x, y, text, path_effects=edge, clip_on=True, **style)


def points(axis, places: Tensor) -> None:
    """Prompts (K, 2), x and y."""
    axis.scatter(*places.T, s=45, c="red", marker="o", edgecolors="white", linewidths=1.2, zorder=5)


def heat(axis, values: Tensor, title: str, crop: Tensor | None = None) -> None:
    """A map of numbers in [0, 1] (H, W): black is 0, white is 1; `crop` as of `panel`."""
    height, width = values.shape
    extent = (0, width, height, 0)
    axis.imshow(values, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    finish(axis, title, extent if crop is None else around(crop))


def bars(axis, values: Tensor, names: list[str], title: str) -> None:
    """A class distribution (C,), each class in its color."""
    colors = [COLORS[k % len(COLORS)] for k in range(len(names))]
    axis.bar(names, values.tolist(), color=colors, edgecolor="black", linewidth=0.6)
    axis.set_ylim(0, 1.12)
    for k, value in enumerate(values.tolist()):
        axis.text(k, value + 0.02, f"{value:.2f}", ha="center", fontsize=7)
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=7)
    axis.tick_params(axis="x", rotation=30)


def silhouette(description: Tensor) -> Tensor:
    """The square at the end of a description of `prototypes.Prototypes`, as an image."""
    side = prototypes.SILHOUETTE
    square = description[-(side**2) :].reshape(side, side)
    return (square - square.min()) / (square.max() - square.min()).clamp(min=1e-6)


def show(figure: Figure, name: str, text: str) -> None:
    """Keep a picture, and show it where there is a notebook.

    Args:
        figure: of `sheet`.
        name: of the file, without its ending.
        text: what is to be seen, for those who cannot see it.
    """
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{name}.png"
    # Without the version of matplotlib in it: the same picture is the same file.
    figure.savefig(path, metadata={"Software": None})
    try:
        from IPython import get_ipython
        from IPython.display import Image as Shown
        from IPython.display import display
    except ImportError:
        return
    if get_ipython():
        display(Shown(filename=str(path), alt=text))
