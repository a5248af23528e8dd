"""Draw docs/img/dataflow.svg: what happens to an image in one step.

    python docs/scripts/make_dataflow.py            draw it
    python docs/scripts/make_dataflow.py --check    status 1 when the figure is not up to date

`BOXES` and `ARROWS` are the one source of the figure. Each box names its file, its function and
its equation; a test checks that all of them exist.
"""

from pathlib import Path
from typing import NamedTuple

from generated import write_or_check

PICTURE = Path(__file__).resolve().parents[1] / "img" / "dataflow.svg"
COLORS = {
    "Guided Distillation": "#dbe9ff",
    "PL-DC": "#d9f2dd",
    "S4M": "#fbdfe6",
    "data and network": "#eceff3",
    "this project": "#fff1cc",
}
LINE, TEXT, BORDER = "#4a5663", "#1c2733", "#6b7785"
# Pixels: a box, the gaps between boxes, the margin around all, the length of an arrow's head.
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN, HEAD = 206, 84, 30, 52, 16, 8


class Box(NamedTuple):
    """name, title, paper; file, function, equation ("" for none); column and row."""

    name: str
    title: str
    paper: str
    file: str
    function: str
    equation: str
    column: int
    row: int


GD, PL_DC, S4M, NET, OWN = COLORS
BOXES = [
    # The unlabeled branch, clockwise.
    Box("unlabeled", "unlabeled images", NET, "ssis/data.py", "Stream", "", 0, 0),
    Box("weak", "weak view", GD, "ssis/augment.py", "weak_view", "", 1, 0),
    Box("teacher", "teacher predicts", GD, "ssis/teacher.py", "predict", "", 2, 0),
    Box("filter", "filter", PL_DC, "ssis/filters.py", "keep", "PL-DC Eq. (dual)", 3, 0),
    Box("measured", "thresholds, measured", OWN, "ssis/calibration.py", "calibrate",
        "ssis Eq. (F1)", 3, 1),
    Box("refine", "SAM redraws masks", S4M, "ssis/refine.py", "refine",
        "S4M Eq. (PR sampling)", 4, 0),
    Box("category", "category correction", PL_DC, "ssis/correction.py", "fuse",
        "PL-DC Eq. (DICC)", 4, 1),
    Box("paste", "copy-paste", S4M, "ssis/copy_paste.py", "arp", "S4M Eq. (ARP)", 4, 2),
    Box("strong", "strong view", GD, "ssis/augment.py", "strong_view", "", 3, 2),
    # The student, its losses, and the way back to the teacher.
    Box("student", "student predicts", NET, "ssis/model.py", "MaskRCNN", "", 2, 2),
    Box("pixels", "mask pixels weighted", PL_DC, "ssis/losses.py", "mask_loss",
        "PL-DC Eq. (PMUA)", 3, 3),
    Box("loss", "sum of the losses", GD, "ssis/losses.py", "total",
        "GD Eq. (total)", 2, 3),
    Box("ema", "EMA of the student", GD, "ssis/teacher.py", "ema_update",
        "GD Eq. (EMA)", 2, 1),
    # The labeled branch; SAM takes part in it while pretraining.
    Box("labeled", "labeled images", NET, "ssis/data.py", "Stream", "", 0, 2),
    Box("strong labeled", "strong view", GD, "ssis/augment.py", "strong_view", "", 1, 2),
    Box("sam", "SAM's features", S4M, "ssis/sam.py", "SegmentAnything", "", 0, 3),
    Box("distill", "structural distillation", S4M, "ssis/sam_distill.py", "loss",
        "S4M Eq. (SD)", 1, 3),
]  # fmt: skip
# From, to, how, words beside it. "right", "left", "down" and "up" go straight from edge to edge,
# "elbow" from the lower edge to the upper edge of a box in another column. A number after a
# colon shifts a vertical arrow, in pixels.
ARROWS = [
    ("unlabeled", "weak", "right", ""),
    ("weak", "teacher", "right", ""),
    ("teacher", "filter", "right", ""),
    ("filter", "refine", "right", ""),
    ("measured", "filter", "up", "method full"),
    ("refine", "category", "down", ""),
    ("category", "paste", "down", ""),
    ("paste", "strong", "left", ""),
    ("strong", "student", "left", ""),
    ("strong", "pixels", "down", "pixel weights"),
    ("pixels", "loss", "left", ""),
    ("student", "loss", "down:-10", ""),
    ("loss", "student", "up:20", "gradients"),
    ("student", "ema", "up", "network weights"),
    ("ema", "teacher", "up", "mutual learning"),
    ("labeled", "strong labeled", "right", ""),
    ("strong labeled", "student", "right", ""),
    ("labeled", "sam", "down", "pretraining"),
    ("sam", "distill", "right", ""),
    ("student", "distill", "elbow", "features"),
    ("distill", "loss", "right", ""),
]
# The free cell of the grid, column and row, in which the legend stands.
LEGEND = (0, 1)


def corner(column: int, row: int) -> tuple[int, int]:
    """The upper left corner of a cell, pixels."""
    return MARGIN + column * (WIDTH + GAP_X), MARGIN + row * (HEIGHT + GAP_Y)


def arrow(start: Box, end: Box, how: str) -> tuple[str, tuple[float, float]]:
    """An arrow's path from edge to edge, and where the words beside it begin.

    Raises:
        ValueError: an unknown way to go.
    """
    (x1, y1), (x2, y2) = corner(start.column, start.row), corner(end.column, end.row)
    way, _, shift = how.partition(":")
    x, y = x1 + WIDTH / 2 + int(shift or 0), y1 + HEIGHT / 2
    if way == "right":
        return f"M{x1 + WIDTH} {y} H{x2 - HEAD}", (x1 + WIDTH + 6, y - 6)
    if way == "left":
        return f"M{x1} {y} H{x2 + WIDTH + HEAD}", (x2 + WIDTH + 6, y - 6)
    if way == "down":
        return f"M{x} {y1 + HEIGHT} V{y2 - HEAD}", (x + 8, y1 + HEIGHT + GAP_Y / 2 + 4)
    if way == "up":
        return f"M{x} {y1} V{y2 + HEIGHT + HEAD}", (x + 8, y1 - GAP_Y / 2 + 4)
    if way == "elbow":
        x, middle, to = x1 + WIDTH / 5, y1 + HEIGHT + GAP_Y / 2, x2 + WIDTH / 2
        return f"M{x} {y1 + HEIGHT} V{middle} H{to} V{y2 - HEAD}", (to + 8, middle - 6)
    raise ValueError(f"no arrow {how!r}: right, left, down, up or elbow")


def written(words: str, x: float, y: float, size: int, style: str = "") -> str:
    """Words as SVG, y at their base line."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{TEXT}" {style}>{words}</text>'


def draw() -> str:
    """The figure, as SVG."""
    by_name = {box.name: box for box in BOXES}
    columns, rows = (1 + max(getattr(box, side) for box in BOXES) for side in ("column", "row"))
    width = 2 * MARGIN + columns * (WIDTH + GAP_X) - GAP_X
    height = 2 * MARGIN + rows * (HEIGHT + GAP_Y) - GAP_Y
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif">',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="0" refY="4" markerWidth="8" '
        'markerHeight="8" markerUnits="userSpaceOnUse" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{LINE}"/></marker></defs>',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for start, end, how, words in ARROWS:
        path, place = arrow(by_name[start], by_name[end], how)
        parts.append(
            f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.6" '
            'marker-end="url(#head)"/>'
        )
        parts += [written(words, *place, 14, 'font-style="italic"')] if words else []
    for box in BOXES:
        x, y = corner(box.column, box.row)
        parts.append(
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" '
            f'fill="{COLORS[box.paper]}" stroke="{BORDER}"/>'
        )
        lines = [box.title, f"{box.file.removeprefix('ssis/')}: {box.function}", box.equation]
        lines = [line for line in lines if line]
        first = y + HEIGHT / 2 - 11 * (len(lines) - 1) + 5
        for k, line in enumerate(lines):
            style = 'text-anchor="middle"' + (' font-weight="bold"' if k == 0 else "")
            parts.append(written(line, x + WIDTH / 2, first + 22 * k, 15 if k else 16, style))
    x, y = corner(*LEGEND)
    for k, (paper, color) in enumerate(COLORS.items()):
        parts.append(
            f'<rect x="{x}" y="{y + 20 * k}" width="26" height="14" rx="3" fill="{color}" '
            f'stroke="{BORDER}"/>'
        )
        parts.append(written(paper, x + 34, y + 20 * k + 12, 15))
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    write_or_check(PICTURE, draw())
