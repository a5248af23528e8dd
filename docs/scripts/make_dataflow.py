"""Draw docs/img/dataflow.svg: what becomes of an image in one step.

    python docs/scripts/make_dataflow.py            draw it
    python docs/scripts/make_dataflow.py --check    status 1 when the picture is not up to date

`BOXES` and `ARROWS` are the one source of the figure. Each box names its file, its function and
its equation; a test holds these against the code.
"""

from pathlib import Path
from typing import NamedTuple

from generated import write_or_check

PICTURE = Path(__file__).resolve().parents[1] / "img" / "dataflow.svg"
COLORS = {
    "Guided Distillation": "#dbe9ff",
    "PL-DC": "#d9f2dd",
    "S4M": "#fbdfe6",
    "Mask R-CNN": "#eceff3",
}
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 216, 78, 34, 46, 18


class Box(NamedTuple):
    """name, words, paper; file, function, equation ("" for none); column and row."""

    name: str
    words: str
    paper: str
    file: str
    function: str
    equation: str
    column: int
    row: int


GD, PL_DC, S4M, NET = COLORS
BOXES = [
    Box("weak", "weak view (unlabeled)", GD, "ssis/augment.py", "weak_view", "", 0, 0),
    Box("teacher", "teacher predicts", GD, "ssis/teacher.py", "predict", "", 1, 0),
    Box("filter", "filter: class and mask apart", PL_DC, "ssis/filters.py", "keep",
        "PL-DC Eq. (adaptive)", 2, 0),
    Box("sam", "SAM redraws the masks", S4M, "ssis/refine.py", "refine",
        "S4M Eq. (PR sampling)", 3, 0),
    Box("category", "classes corrected", PL_DC, "ssis/correction.py", "fuse",
        "PL-DC Eq. (DICC)", 3, 1),
    Box("paste", "copy-paste", S4M, "ssis/augment.py", "arp", "S4M Eq. (ARP)", 2, 1),
    Box("strong", "strong view", GD, "ssis/augment.py", "strong_view", "", 1, 1),
    Box("student", "student predicts", NET, "ssis/model.py", "MaskRCNN", "", 1, 2),
    Box("pixels", "mask pixels weighted", PL_DC, "ssis/losses.py", "mask_loss",
        "PL-DC Eq. (PMUA)", 2, 2),
    Box("loss", "labeled + unlabeled loss", GD, "ssis/losses.py", "total", "GD Eq. (total)", 3, 2),
    Box("labeled", "strong view (labeled)", GD, "ssis/data.py", "Stream", "", 0, 2),
    Box("distill", "pretraining: SAM's layout", S4M, "ssis/sam_distill.py", "loss",
        "S4M Eq. (SD)", 0, 3),
    Box("step", "gradient step", NET, "train.py", "train_step", "", 3, 3),
    Box("ema", "teacher follows the student", GD, "ssis/teacher.py", "ema_update",
        "GD Eq. (EMA)", 1, 3),
]  # fmt: skip
# From, to, and how: "across" or "down" the grid, around "left", or "below" a row.
ARROWS = [
    ("weak", "teacher", "across"),
    ("teacher", "filter", "across"),
    ("filter", "sam", "across"),
    ("sam", "category", "down"),
    ("category", "paste", "across"),
    ("paste", "strong", "across"),
    ("strong", "student", "down"),
    ("labeled", "student", "across"),
    ("student", "pixels", "across"),
    ("pixels", "loss", "across"),
    ("loss", "step", "down"),
    ("step", "ema", "across"),
    ("labeled", "distill", "down"),
    ("distill", "step", "below"),
    ("ema", "teacher", "left"),
]


def corner(box: Box) -> tuple[int, int]:
    """The upper left corner of a box, pixels."""
    return MARGIN + box.column * (WIDTH + GAP_X), MARGIN + box.row * (HEIGHT + GAP_Y)


def path(start: Box, end: Box, how: str) -> str:
    """An arrow's path from edge to edge."""
    (x1, y1), (x2, y2) = corner(start), corner(end)
    if how == "down":
        return f"M{x1 + WIDTH / 2} {y1 + HEIGHT} V{y2 - 7}"
    if how == "across":
        y = y1 + HEIGHT / 2
        if x2 > x1:
            return f"M{x1 + WIDTH} {y} H{x2 - 7}"
        return f"M{x1} {y} H{x2 + WIDTH + 7}"
    if how == "below":
        y = y1 + HEIGHT + GAP_Y / 3
        return f"M{x1 + WIDTH / 2} {y1 + HEIGHT} V{y} H{x2 + WIDTH / 2} V{y2 + HEIGHT + 7}"
    # Up through the gap left of the column, into the lower edge of the box.
    gap, below = x1 - GAP_X / 2, y2 + HEIGHT + GAP_Y / 2
    y = y1 + HEIGHT / 3
    return f"M{x1} {y} H{gap} V{below} H{x2 + WIDTH / 4} V{y2 + HEIGHT + 7}"


def draw() -> str:
    """The picture, as SVG."""
    by_name = {box.name: box for box in BOXES}
    columns, rows = (1 + max(getattr(box, side) for box in BOXES) for side in ("column", "row"))
    width = 2 * MARGIN + columns * (WIDTH + GAP_X) - GAP_X
    height = 2 * MARGIN + rows * (HEIGHT + GAP_Y)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13">',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="1" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#4a5663"/></marker>'
        "</defs>",
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for start, end, how in ARROWS:
        parts.append(
            f'<path d="{path(by_name[start], by_name[end], how)}" fill="none" '
            'stroke="#4a5663" stroke-width="1.5" marker-end="url(#head)"/>'
        )
    for box in BOXES:
        x, y = corner(box)
        parts.append(
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" '
            f'fill="{COLORS[box.paper]}" stroke="#6b7785"/>'
        )
        file = box.file.removeprefix("ssis/")
        lines = [(box.words, "bold", 13), (f"{file}  {box.function}", "normal", 12)]
        lines += [(box.equation, "normal", 12)] if box.equation else []
        first = y + HEIGHT / 2 - 9 * (len(lines) - 1) + 4
        for k, (words, weight, size) in enumerate(lines):
            parts.append(
                f'<text x="{x + WIDTH / 2}" y="{first + 19 * k:.0f}" text-anchor="middle" '
                f'font-weight="{weight}" font-size="{size}" fill="#1c2733">{words}</text>'
            )
    for k, (words, color) in enumerate(COLORS.items()):
        x, y = MARGIN + 190 * k, height - MARGIN - 8
        parts.append(
            f'<rect x="{x}" y="{y - 12}" width="16" height="16" fill="{color}" stroke="#6b7785"/>'
            f'<text x="{x + 22}" y="{y + 1}" fill="#1c2733">{words}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    write_or_check(PICTURE, draw())
